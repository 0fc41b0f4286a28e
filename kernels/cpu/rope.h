// Rotary position embedding, half-split, with the norm of each head that may come before it.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

struct Heads {
    const float* x;     // [tokens, heads, dim]
    const float* norm;  // [dim]: the root mean square norm's weight; or null: x is turned as it is
    float* out;         // [tokens, heads, dim]
    int64_t heads;
};

struct Rope {
    Heads parts[2];  // queries and keys, which share their angles; the second may have 0 heads
    const int32_t* positions;  // [tokens]
    const float* inv_freq;     // [dim / 2]
    int64_t tokens, dim;
    float eps;
};
TINY_KERNEL(rope, Rope)

}  // namespace tiny_llm
