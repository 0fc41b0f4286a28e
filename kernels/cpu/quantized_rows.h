// x times a matrix in MLX's affine format, read as it lies in a checkpoint: nothing is packed first.
//
// w[o, i] = scale[o, i / group] * q[o, i] + bias[o, i / group], q from the low bits of each word up. All float32.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

struct QuantizedRows {
    const float* x;         // [T, I]
    const uint32_t* words;  // [O, I * bits / 32]
    const float* scales;    // [O, I / group]
    const float* biases;    // [O, I / group]
    float* out;             // [T, O]
    int64_t rows, inputs, outputs;  // T, I, O
    int group;              // 32, 64 or 128
    int bits;               // 2, 4 or 8: no weight lies across two words
};

TINY_KERNEL(quantized_rows, QuantizedRows)

}  // namespace tiny_llm
