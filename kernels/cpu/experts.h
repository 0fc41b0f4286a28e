// A mixture of experts: which gated MLPs each row goes to, and the sum of what they make of it.
//
// Rows are sorted by expert, and each expert's weights are read once for all of its rows. A row's outputs are added
// up in the order in which the router prefers its experts: its bits depend on that row alone.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "matrix.h"

namespace tiny_llm {

// Matrices of `count` experts: gate and up [F, E], down [E, F]. One half may be made without the other: then
// `hidden` comes out, or goes in, in the order of the experts that its rows go to.
struct Experts {
    const float* x;           // [T, E]
    const float* logits;      // [T, N], the router's
    const float* correction;  // [N], added to the probabilities that choose; or null
    float* hidden;            // [T * k, F], and
    float* outputs;           // [T * k, E], to work in
    float* out;               // [T, E]
    int64_t rows;             // T
    int per_row;              // k
    bool normalised;          // a row's weights add up to 1
    int64_t count;            // N
    bool gates, weighs;       // which halves
    Matrix gate_up[2], down;
};
TINY_KERNEL(experts, Experts)

}  // namespace tiny_llm
