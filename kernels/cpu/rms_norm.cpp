#include "rms_norm.h"

#include "norm.h"
#include "pool.h"

namespace tiny_llm::TINY_ISA {
namespace {

// begin 2.7 add_norm_row
// Row `row` of sum = x + residual, and in out that sum's norm, while it is still near.
void add_norm_row(const RmsNorm& a, int64_t row) {
    const int64_t at = row * a.width;
    const float *x = a.x + at, *residual = a.residual + at;
    float* sum = a.sum + at;
    int64_t i = 0;
    for (; i + kWidth <= a.width; i += kWidth) store(sum + i, load(x + i) + load(residual + i));
    for (; i < a.width; ++i) sum[i] = x[i] + residual[i];
    norm_row(sum, a.weight, a.eps, a.width, a.out + at);
}
// end 2.7

}  // namespace

void rms_norm(const RmsNorm& a) {
    const int64_t grain = 1 + 16384 / (a.width + 1);
    parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            if (a.residual) {
                add_norm_row(a, row);
            } else {
                norm_row(a.x + row * a.width, a.weight, a.eps, a.width, a.out + row * a.width);
            }
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
