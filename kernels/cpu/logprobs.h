// How likely the model finds a chosen token, and which ones it finds likeliest.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

// Log-probabilities are logit - log(sum(exp(logits))), NaN where the row's largest logit is not finite.
struct Logprobs {
    const float* logits;     // [rows, vocab], vocab at least 1
    const uint32_t* tokens;  // [rows]; NaN is the answer for one that is not in the vocabulary
    float* chosen;           // [rows]: the tokens'
    uint32_t* ids;           // [rows, count], count at most vocab: best first, the lower id among equals
    float* values;           // [rows, count]: theirs
    int64_t rows, vocab, count;
};

TINY_KERNEL(logprobs, Logprobs)

}  // namespace tiny_llm
