#include "rms_norm.h"

#include <math.h>

#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {
namespace {

// Two sums in lanes, then the tail one by one: the order depends on the width alone.
float mean_square(const float* x, int64_t width) {
    vf even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * kWidth <= width; i += 2 * kWidth) {
        const vf a = load(x + i), b = load(x + i + kWidth);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    float total = sum(even + odd);
    for (; i < width; ++i) total += x[i] * x[i];
    return total / (float)width;
}

void add(const float* a, const float* b, float* out, int64_t width) {
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) store(out + i, load(a + i) + load(b + i));
    for (; i < width; ++i) out[i] = a[i] + b[i];
}

void scale(const float* x, const float* weight, float factor, float* out, int64_t width) {
    const vf factors = splat(factor);
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) store(out + i, load(x + i) * factors * load(weight + i));
    for (; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace

void rms_norm(const RmsNorm& a) {
    const int64_t grain = 1 + 16384 / a.width;
    parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t at = row * a.width;
            const float* x = a.x + at;
            if (a.residual) {
                add(x, a.residual + at, a.sum + at, a.width);
                x = a.sum + at;
            }
            scale(x, a.weight, 1.0f / sqrtf(mean_square(x, a.width) + a.eps), a.out + at, a.width);
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
