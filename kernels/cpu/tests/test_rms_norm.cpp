#include "../rms_norm.h"
#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

// Odd widths, with and without a residual, against float64.
TEST(rms_norm_matches_float64) {
    on_each_isa([] {
        for (int64_t rows : {0, 1, 3, 40})
            for (int64_t width : {1, 7, 16, 33, 896, 1537}) {
                const size_t n = rows * width;
                const auto x = random_floats(n, 1), residual = random_floats(n, 2), weight = random_floats(width, 3);
                std::vector<float> sum(n), out(n);
                std::vector<double> expected(n);
                rms_norm({x.data(), residual.data(), weight.data(), sum.data(), out.data(), rows, width, 1e-6f});
                for (int64_t r = 0; r < rows; ++r) {
                    double squares = 0;
                    for (int64_t i = 0; i < width; ++i) squares += std::pow(x[r * width + i] + residual[r * width + i], 2);
                    for (int64_t i = 0; i < width; ++i)
                        expected[r * width + i] = double(x[r * width + i] + residual[r * width + i]) /
                                                  std::sqrt(squares / width + 1e-6) * weight[i];
                }
                CHECK(off(out.data(), expected.data(), n) < 2e-6, "rows %d width %d", int(rows), int(width));
            }
    });
}
