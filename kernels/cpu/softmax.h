// Softmax of rows.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

struct Softmax {
    const float* x;  // [rows, width]
    float* out;      // [rows, width]
    int64_t rows, width;
};
TINY_KERNEL(softmax, Softmax)

}  // namespace tiny_llm
