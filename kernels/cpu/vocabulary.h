// A row of logits as many threads read it: in chunks, whose results are put together in chunk order.
// Owns the search for the largest one. Kernel files only.
#pragma once

#include <math.h>

#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {

constexpr int64_t kChunk = 16384;  // fixed: it decides the order of sums

static inline int64_t chunks_of(int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

// body(chunk, begin, end) for each chunk of a row.
template <class Body>
static inline void for_chunks(int64_t vocab, const Body& body) {
    parallel_for(vocab, kChunk, [&](int64_t begin, int64_t end) { body(begin / kChunk, begin, end); });
}

// A vector of x; past the end it is -inf.
static inline vf logits_at(const float* x, int64_t i, int64_t end) {
    return i + kWidth <= end ? load(x + i) : load_part(x + i, end - i, -INFINITY);
}

// NaN if there is one.
static inline float largest(const float* x, int64_t begin, int64_t end) {
    vf most = splat(-INFINITY);
    vi nan = {};
    for (int64_t i = begin; i < end; i += kWidth) {
        const vf v = logits_at(x, i, end);
        most = max(v, most);
        nan |= v != v;
    }
    return any(nan) ? NAN : max_of(most);
}

struct Largest {
    float value;
    int64_t chunk;  // the first that has it
};

static inline Largest largest_of(const float* x, int64_t vocab) {
    const int64_t chunks = chunks_of(vocab);
    float* most = (float*)scratch(0, chunks * sizeof(float));
    for_chunks(vocab, [=](int64_t chunk, int64_t begin, int64_t end) { most[chunk] = largest(x, begin, end); });
    Largest found{most[0], 0};
    for (int64_t i = 1; i < chunks && found.value == found.value; ++i)
        if (!(most[i] <= found.value)) found = {most[i], i};
    return found;
}

static inline uint32_t place_of(const float* x, int64_t vocab, Largest largest) {
    for (int64_t i = largest.chunk * kChunk; i < vocab; i += kWidth) {
        const vf v = logits_at(x, i, vocab);
        const vi here = largest.value == largest.value ? v == splat(largest.value) : v != v;
        if (!any(here)) continue;
        for (int lane = 0; lane < kWidth; ++lane)
            if (here[lane]) return (uint32_t)(i + lane);
    }
    return 0;
}

}  // namespace tiny_llm::TINY_ISA
