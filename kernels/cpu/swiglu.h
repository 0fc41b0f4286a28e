// The gated unit between an MLP's halves: silu(gate) * up.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

struct SwiGlu {
    const float *gate, *up;  // [count]
    float* out;              // [count]
    int64_t count;
};
TINY_KERNEL(swiglu, SwiGlu)

}  // namespace tiny_llm
