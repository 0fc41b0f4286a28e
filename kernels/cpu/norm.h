// The root mean square norm of one row. Kernel files only.
#pragma once

#include <math.h>

#include "simd.h"

namespace tiny_llm::TINY_ISA {

// Two sums in lanes, then the tail one by one: the order depends on the width alone.
static inline float mean_square(const float* x, int64_t width) {
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

// out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
static inline void norm_row(const float* x, const float* weight, float eps, int64_t width, float* out) {
    const float factor = 1.0f / sqrtf(mean_square(x, width) + eps);
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) store(out + i, load(x + i) * splat(factor) * load(weight + i));
    for (; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace tiny_llm::TINY_ISA
