// From a checkpoint's layout to the kernels' tiles (matrix.h), once at load.
#pragma once

#include "matrix.h"

namespace tiny_llm {

struct QuantizedSource {
    const uint8_t* values;  // MLX's: [rows] of columns * bits / 8 bytes, values from the low bits up
    const uint8_t* scales;  // [rows, columns / group] of the matrix's scales' kind
    const uint8_t* biases;
    int bits;  // 2 to 6 or 8; the matrix is q4 for at most 4, else q8: the same q, so the same weights
};

// `out` is where matrix.data lies, zeroed.
void pack_quantized(const QuantizedSource& source, const Matrix& matrix, uint8_t* out);

// `source` is [rows, columns] of the matrix's kind.
void pack_dense(const void* source, const Matrix& matrix, void* out);

}  // namespace tiny_llm
