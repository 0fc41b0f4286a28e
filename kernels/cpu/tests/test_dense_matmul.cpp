#include "../dense_matmul.h"

#include "../pool.h"
#include "weights.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

std::vector<float> multiply(const std::vector<float>& x, int64_t rows, const Weights& w, const float* bias) {
    std::vector<float> out(rows * w.layout.rows);
    float* to = out.data();
    dense_matmul({x.data(), rows, 1, &w.layout, &bias, &to, false});
    return out;
}

std::vector<double> product(const std::vector<float>& x, const Weights& w, const float* bias) {
    const int64_t inputs = w.layout.columns, outputs = w.layout.rows, rows = x.size() / inputs;
    std::vector<double> out(rows * outputs);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < outputs; ++o) {
            double& sum = out[r * outputs + o] = bias ? bias[o] : 0;
            for (int64_t k = 0; k < inputs; ++k) sum += double(x[r * inputs + k]) * w.values[o * inputs + k];
        }
    return out;
}

}  // namespace

// All kinds, edges of tiles and of row blocks; three matrices for one x, of which one has a bias.
TEST(dense_matmul_matches_float64) {
    on_each_isa([] {
        for (int64_t inputs : {1, 7, 64, 129})
            for (int64_t rows : {0, 1, 2, 3, 5, 11, 12, 13, 25, 40}) {
                const auto x = random_floats(rows * inputs, 1), bias = random_floats(48, 2);
                const float* biases[] = {nullptr, bias.data(), nullptr};
                const int64_t sizes[] = {1 + inputs % 50, 48, 17};
                std::vector<Weights> weights;
                std::vector<Matrix> matrices;
                std::vector<float> outs[3];
                float* to[3];
                for (int i = 0; i < 3; ++i) {
                    weights.emplace_back(kDenseKinds[(i + rows) % 3], sizes[i], inputs, 10 + i);
                    matrices.push_back(weights[i].layout);
                    outs[i].resize(rows * sizes[i]);
                    to[i] = outs[i].data();
                }
                dense_matmul({x.data(), rows, 3, matrices.data(), biases, to, false});
                for (int i = 0; i < 3; ++i) {
                    const auto expected = product(x, weights[i], biases[i]);
                    const double error = off(to[i], expected.data(), expected.size());
                    CHECK(error < 3e-6, "no. %d: %d rows, %d inputs: %g", i, int(rows), int(inputs), error);
                }
            }
    });
}

// Weights of bf16 whose inputs may be rounded as they are; an input without a partner, and what lies behind the last.
TEST(dense_matmul_rounds_inputs_to_bf16_where_that_is_fast) {
    on_each_isa([] {
        const bool rounds = std::string(isa_name(isa())) == "avx512bf16";
        for (int64_t inputs : {1, 2, 15, 16, 17, 31, 32, 33, 129, 256})
            for (int64_t rows : {1, 2, 5, 12, 13, 40}) {
                Weights w(Kind::bf16, 50, inputs, 10);
                w.layout.exact = false;
                const auto x = random_floats(rows * inputs, 1);
                auto seen = x;
                if (rounds)
                    for (float& value : seen) value = to_bf16(value);
                const auto out = multiply(x, rows, w, nullptr);
                const auto expected = product(seen, w, nullptr);
                const double error = off(out.data(), expected.data(), expected.size());
                CHECK(error < 3e-6, "%d rows, %d inputs: %g", int(rows), int(inputs), error);
            }
    });
}

TEST(dense_matmul_gates_up_by_silu_of_gate) {
    on_each_isa([] {
        for (int64_t outputs : {1, 16, 40})
            for (int64_t rows : {1, 14}) {
                const int64_t inputs = 33;
                const Weights gate(Kind::bf16, outputs, inputs, 1), up(Kind::bf16, outputs, inputs, 2);
                const auto x = random_floats(rows * inputs, 3, -3, 3), bias = random_floats(outputs, 4);
                const Matrix matrices[] = {gate.layout, up.layout};
                const float* biases[] = {nullptr, bias.data()};
                std::vector<float> out(rows * outputs);
                float* to = out.data();
                dense_matmul({x.data(), rows, 2, matrices, biases, &to, true});
                auto expected = product(x, gate, nullptr);
                const auto ups = product(x, up, bias.data());
                for (size_t i = 0; i < ups.size(); ++i) expected[i] *= ups[i] / (1 + std::exp(-expected[i]));
                const double error = off(out.data(), expected.data(), ups.size());
                CHECK(error < 3e-6, "%d rows, %d outputs: %g", int(rows), int(outputs), error);
            }
    });
}

// Row r alone, and among others, on one thread and on several: the same bits.
TEST(dense_matmul_of_a_row_does_not_depend_on_the_others) {
    on_each_isa([] {
        const int64_t inputs = 161, outputs = 50, most = 300;
        const int threads = num_threads();
        for (int i = 0; i < 5; ++i) {
            Weights w(kDenseKinds[i % 3], outputs, inputs, 1);
            w.layout.exact = i % 2;  // of bf16 both
            const auto x = random_floats(most * inputs, 2);
            std::vector<float> alone;
            for (int64_t r = 0; r < most; ++r) {
                const auto from = x.begin() + r * inputs;
                const auto row = multiply({from, from + inputs}, 1, w, nullptr);
                alone.insert(alone.end(), row.begin(), row.end());
            }
            for (int64_t rows : {2, 9, 12, 31, 257, 300}) {
                set_num_threads(static_cast<int>(rows) % 3 + 1);
                const auto out = multiply(x, rows, w, nullptr);
                CHECK(!std::memcmp(out.data(), alone.data(), out.size() * 4), "%d rows", int(rows));
            }
        }
        set_num_threads(threads);
    });
}

TEST(dense_matmul_without_inputs_is_the_bias) {
    on_each_isa([] {
        const auto bias = random_floats(20, 1);
        const auto out = multiply({}, 2, Weights(Kind::bf16, 20, 0, 1), bias.data());
        CHECK(!std::memcmp(out.data(), bias.data(), 80) && !std::memcmp(&out[20], bias.data(), 80));
    });
}
