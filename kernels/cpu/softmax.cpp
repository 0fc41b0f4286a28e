#include "softmax.h"

#include <math.h>

#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {
namespace {

// Missing lanes are filled with -inf, which changes neither the largest nor the sum.
vf part_of(const float* x, int64_t i, int64_t width) {
    return i + kWidth <= width ? load(x + i) : load_part(x + i, width - i, -INFINITY);
}

float largest(const float* x, int64_t width) {
    vf most = splat(-INFINITY);
    for (int64_t i = 0; i < width; i += kWidth) most = max(most, part_of(x, i, width));
    return max_of(most);
}

// A NaN among x, or nothing but -inf, makes the sum NaN and so the whole row.
void softmax_row(const float* x, int64_t width, float* out) {
    const vf most = splat(largest(x, width));
    vf sums = {};
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) {
        const vf e = exp(load(x + i) - most);
        store(out + i, e);
        sums += e;
    }
    const vf last = exp(load_part(x + i, width - i, -INFINITY) - most);
    const vf total = splat(sum(sums + last));
    store_part(out + i, last / total, width - i);
    for (int64_t j = 0; j < i; j += kWidth) store(out + j, load(out + j) / total);
}

}  // namespace

void softmax(const Softmax& a) {
    parallel_for(a.rows, 1 + 8192 / (a.width + 1), [&](int64_t begin, int64_t end) {
        for (int64_t at = begin * a.width; at < end * a.width; at += a.width)
            softmax_row(a.x + at, a.width, a.out + at);
    });
}

}  // namespace tiny_llm::TINY_ISA
