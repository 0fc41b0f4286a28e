#include "../softmax.h"

#include <algorithm>

#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

std::vector<float> of(const std::vector<float>& x, int64_t width) {
    std::vector<float> out(x.size());
    softmax({x.data(), out.data(), static_cast<int64_t>(x.size()) / width, width});
    return out;
}

}  // namespace

TEST(softmax_matches_float64) {
    on_each_isa([] {
        for (int64_t width : {1, 2, 15, 16, 17, 33, 300, 9000})
            for (float range : {1.0f, 30.0f, 3000.0f}) {
                const auto x = random_floats(3 * width, 1, -range, range);
                const auto out = of(x, width);
                std::vector<double> expected(x.size());
                for (int64_t at = 0; at < 3 * width; at += width) {
                    double sum = 0;
                    const double most = *std::max_element(&x[at], &x[at] + width);
                    for (int64_t i = at; i < at + width; ++i) sum += expected[i] = std::exp(x[i] - most);
                    for (int64_t i = at; i < at + width; ++i) expected[i] /= sum;
                }
                const double error = off(out.data(), expected.data(), x.size());
                CHECK(error < 1e-6, "width %d, range %g: %g", int(width), range, error);
            }
    });
}

// A row (0, x) gives e^x / (1 + e^x): each value to the last digits, down to where a float ends.
TEST(softmax_exponentials_are_right_to_the_last_digits) {
    on_each_isa([] {
        double worst = 0;
        for (float x = 0; x > -87; x = x * 1.01f - 0.001f) {
            const double e = std::exp(double(x)), expected = e / (1 + e);
            worst = std::fmax(worst, std::fabs(of({0, x}, 2)[1] - expected) / expected);
        }
        CHECK(worst < 3e-7, "%g", worst);
        CHECK(of({0, -95}, 2)[1] > 0 && of({0, -150}, 2)[1] == 0);
    });
}

TEST(softmax_of_infinities_and_nan) {
    on_each_isa([] {
        const float inf = INFINITY;
        for (int64_t width : {2, 5, 40}) {
            std::vector<float> one(width, -inf), none(width, -inf), nan(width, 0), most(width, 0);
            one[1] = 3, nan[1] = NAN, most[1] = inf;
            const auto out = of(one, width);
            for (int64_t i = 0; i < width; ++i) CHECK(out[i] == (i == 1));
            for (const auto& x : {none, nan, most})
                for (float value : of(x, width)) CHECK(std::isnan(value), "as in the formula");
        }
    });
}
