// The largest value's place in each row.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

// The lowest place among equals; a NaN is larger than any number. Rows of at least one value.
struct Argmax {
    const float* x;   // [rows, width]
    uint32_t* places;  // [rows]
    int64_t rows, width;
};

TINY_KERNEL(argmax, Argmax)

}  // namespace tiny_llm
