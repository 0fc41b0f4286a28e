// Root mean square norm, with the residual sum that comes before it.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

struct RmsNorm {
    const float* x;         // [rows, width]
    const float* residual;  // [rows, width] added to x first, or null
    const float* weight;    // [width]
    float* sum;             // [rows, width] gets x + residual; null without residual
    float* out;             // [rows, width]
    int64_t rows, width;
    float eps;
};

TINY_KERNEL(rms_norm, RmsNorm)

}  // namespace tiny_llm
