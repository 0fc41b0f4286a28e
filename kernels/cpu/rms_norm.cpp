#include "rms_norm.h"

#include "norm.h"
#include "pool.h"

namespace tiny_llm::TINY_ISA {
namespace {

void add(const float* a, const float* b, float* out, int64_t width) {
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) store(out + i, load(a + i) + load(b + i));
    for (; i < width; ++i) out[i] = a[i] + b[i];
}

}  // namespace

void rms_norm(const RmsNorm& a) {
    const int64_t grain = 1 + 16384 / (a.width + 1);
    parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t at = row * a.width;
            const float* x = a.x + at;
            if (a.residual) {
                add(x, a.residual + at, a.sum + at, a.width);
                x = a.sum + at;
            }
            norm_row(x, a.weight, a.eps, a.width, a.out + at);
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
