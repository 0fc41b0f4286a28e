#include "../dense_matmul.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "../pack.h"
#include "../pool.h"
#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

constexpr Kind kKinds[] = {Kind::f32, Kind::bf16, Kind::f16};

// A random matrix of weights that its kind can hold, packed, and the same as floats.
struct Weights {
    Weights(Kind kind, int64_t outputs, int64_t inputs, uint32_t seed)
        : values(random_floats(outputs * inputs, seed)),
          layout{nullptr, outputs, inputs, kind, kind, 0, true},
          tiles(std::aligned_alloc(64, bytes() + 64), std::free) {
        std::vector<char> stored;
        for (float& value : values) keep(value, stored);
        pack_dense(stored.data(), layout, tiles.get());
        layout.data = static_cast<const char*>(tiles.get());
    }

    int64_t bytes() const { return tiny_llm::tiles(layout) * tile_bytes(layout); }

    std::vector<float> values;
    Matrix layout;
    std::unique_ptr<void, void (*)(void*)> tiles;

private:
    // Cuts a value to what the kind holds: half of a float's bits, or ten of its fraction.
    void keep(float& value, std::vector<char>& stored) const {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (layout.kind == Kind::bf16) bits &= 0xffff0000;
        if (layout.kind == Kind::f16) bits = std::fabs(value) < 6.2e-5f ? 0 : bits & 0xffffe000;
        std::memcpy(&value, &bits, 4);
        uint32_t word = layout.kind == Kind::f32 ? bits : bits >> 16;
        const uint32_t magnitude = bits & 0x7fffffff;
        if (layout.kind == Kind::f16 && bits) word = (word & 0x8000) | ((magnitude >> 13) - (112 << 10));
        const char* bytes = reinterpret_cast<const char*>(&word);
        stored.insert(stored.end(), bytes, bytes + bits_of(layout.kind) / 8);
    }
};

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
                    weights.emplace_back(kKinds[(i + rows) % 3], sizes[i], inputs, 10 + i);
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
        for (Kind kind : kKinds) {
            const Weights w(kind, outputs, inputs, 1);
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
