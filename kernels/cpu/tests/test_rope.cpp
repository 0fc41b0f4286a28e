#include "../rope.h"
#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

std::vector<float> frequencies(int64_t dim) {
    std::vector<float> values;
    for (int64_t i = 0; i < dim / 2; ++i) values.push_back(float(std::pow(10000.0, -2.0 * i / dim)));
    return values;
}

// The formula in float64, of float32 angles; `norm` may be null.
std::vector<double> turned(const std::vector<float>& x, const float* norm, int64_t heads,
                           const std::vector<int32_t>& positions, const std::vector<float>& inv_freq) {
    const int64_t half = inv_freq.size(), dim = 2 * half;
    std::vector<double> out(x.size());
    for (size_t head = 0; head < x.size() / dim; ++head) {
        double squares = 0;
        for (int64_t i = 0; i < dim; ++i) squares += double(x[head * dim + i]) * x[head * dim + i];
        const double factor = norm ? 1 / std::sqrt(squares / dim + 1e-6) : 1;
        for (int64_t i = 0; i < half; ++i) {
            const double angle = static_cast<float>(positions[head / heads]) * inv_freq[i];
            const double a = x[head * dim + i] * factor * (norm ? norm[i] : 1);
            const double b = x[head * dim + half + i] * factor * (norm ? norm[half + i] : 1);
            out[head * dim + i] = a * std::cos(angle) - b * std::sin(angle);
            out[head * dim + half + i] = b * std::cos(angle) + a * std::sin(angle);
        }
    }
    return out;
}

}  // namespace

// Queries and keys of odd sizes, with and without norms, at positions beyond any model's context.
TEST(rope_matches_float64) {
    on_each_isa([] {
        const std::vector<int32_t> positions{0, 1, 7, 100000, 131071, 1000003, 3};
        const int64_t tokens = positions.size();
        for (int64_t dim : {2, 8, 10, 64, 80, 96, 128, 256})
            for (int mask = 0; mask < 4; ++mask) {
                const auto q = random_floats(tokens * 3 * dim, 1), k = random_floats(tokens * dim, 2);
                const auto q_norm = random_floats(dim, 3), k_norm = random_floats(dim, 4);
                const auto inv_freq = frequencies(dim);
                const float* norms[2] = {};
                if (mask & 1) norms[0] = q_norm.data();
                if (mask & 2) norms[1] = k_norm.data();
                std::vector<float> q_out(q.size()), k_out(k.size());
                rope({{{q.data(), norms[0], q_out.data(), 3}, {k.data(), norms[1], k_out.data(), 1}},
                      positions.data(), inv_freq.data(), tokens, dim, 1e-6f});
                const auto q_expected = turned(q, norms[0], 3, positions, inv_freq);
                const auto k_expected = turned(k, norms[1], 1, positions, inv_freq);
                const double q_error = off(q_out.data(), q_expected.data(), q.size());
                const double k_error = off(k_out.data(), k_expected.data(), k.size());
                const double error = std::fmax(q_error, k_error);
                CHECK(error < 4e-7, "dim %d, norms %d: %g", int(dim), mask, error);
            }
    });
}

// Every quarter of the circle, and angles near its borders: (1, 0) becomes (cos, sin).
TEST(rope_angles_are_right_in_every_quarter) {
    on_each_isa([] {
        std::vector<float> inv_freq = random_floats(1000, 5, 0, 8), x(2000);
        for (int i = 0; i < 100; ++i) inv_freq[i] = static_cast<float>(i * 0.78539816339744831);
        std::fill(x.begin(), x.begin() + 1000, 1.0f);
        for (int32_t position : {1, -1, 3, 65537, INT32_MAX}) {
            std::vector<float> out(2000);
            std::vector<double> expected(2000);
            rope({{{x.data(), nullptr, out.data(), 1}, {nullptr, nullptr, nullptr, 0}},
                  &position, inv_freq.data(), 1, 2000, 0});
            for (int i = 0; i < 1000; ++i) {
                const double angle = static_cast<float>(position) * inv_freq[i];
                expected[i] = std::cos(angle), expected[1000 + i] = std::sin(angle);
            }
            const double error = off(out.data(), expected.data(), 2000);
            CHECK(error < (position == INT32_MAX ? 2e-5 : 7e-8), "position %d: %g", position, error);
        }
    });
}

TEST(rope_of_no_tokens_or_no_heads_is_nothing) {
    on_each_isa([] {
        const int32_t position = 1;
        const float frequency = 1;
        float out[] = {5, 5, 5};
        rope({{{out, nullptr, out + 1, 2}, {out, nullptr, out + 1, 1}}, nullptr, &frequency, 0, 2, 0});
        rope({{{out, nullptr, out + 1, 0}, {nullptr, nullptr, nullptr, 0}}, &position, &frequency, 1, 2, 0});
        CHECK(out[1] == 5 && out[2] == 5);
    });
}
