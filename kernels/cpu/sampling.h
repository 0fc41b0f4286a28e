// One token a row of logits: the largest, or a draw among those that the row's filters keep.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

// How one row is drawn.
struct Draw {
    float temperature;  // 0: the largest, and all else is ignored
    float least_score;  // min-p: log p, where the best token has 0
    double top_p;       // 1 or more: off
    int64_t top_k;      // 0: off
    uint64_t seed, position;
};

struct Sampling {
    const float* logits;  // [rows, vocab], vocab at least 1
    const Draw* draws;    // [rows]
    uint32_t* tokens;     // [rows]
    int64_t rows, vocab;
};

TINY_KERNEL(sampling, Sampling)

}  // namespace tiny_llm
