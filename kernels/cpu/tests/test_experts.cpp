#include "../experts.h"

#include <algorithm>

#include "../pool.h"
#include "../quantized_matmul.h"
#include "../tile_matmul.h"
#include "quantized.h"
#include "tile_emulator.h"
#include "weights.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

using Floats = std::vector<float>;
constexpr int64_t kCount = 5, kWidth = 128, kInner = 96;
constexpr int kPerRow = 2;

// Experts' matrices lie as one matrix of all their outputs, of which each has whole tiles.
template <class Stored>
Matrix stack_of(const Stored& all) {
    Matrix m = all.layout;
    m.rows /= kCount, m.count = kCount;
    return m;
}

Floats mix(const Matrix& gate, const Matrix& up, const Matrix& down, const Floats& x, const Floats& logits,
           const float* correction = nullptr, bool normalised = true) {
    const int64_t rows = logits.size() / kCount, pairs = rows * kPerRow;
    Floats out(rows * kWidth, -7.0f), hidden(pairs * kInner), outputs(pairs * kWidth);
    experts({x.data(), logits.data(), correction, hidden.data(), outputs.data(), out.data(), rows, kPerRow, normalised,
             kCount, true, true, {gate, up}, down});
    return out;
}

// The same, the second half without the first one's matrices: as where each is another's part.
Floats mix_by_halves(const Matrix& gate, const Matrix& up, const Matrix& down, const Floats& x, const Floats& logits) {
    const int64_t rows = logits.size() / kCount, pairs = rows * kPerRow;
    Floats out(rows * kWidth, -7.0f), hidden(pairs * kInner), outputs(pairs * kWidth);
    experts({x.data(), logits.data(), nullptr, hidden.data(), nullptr, nullptr, rows, kPerRow, true, kCount, true, false,
             {gate, up}, {}});
    experts({nullptr, logits.data(), nullptr, hidden.data(), outputs.data(), out.data(), rows, kPerRow, true, kCount,
             false, true, {}, down});
    return out;
}

Floats rows_of(const Floats& all, int64_t width, int64_t begin, int64_t end) {
    return Floats(all.begin() + begin * width, all.begin() + end * width);
}

template <class Body>
void on_each_kind(const Body& body) {
    for (int bits : {4, 8})
        for (bool exact : {false, true}) {
            const Quantized gate(kCount * kInner, kWidth, bits, 32, exact, 1), up(kCount * kInner, kWidth, 12 - bits, 32, exact, 2);
            const Quantized down(kCount * kWidth, kInner, bits, 32, exact, 3, Kind::bf16);
            body(stack_of(gate), stack_of(up), stack_of(down));
        }
    for (Kind kind : kDenseKinds) {
        const Weights gate(kind, kCount * kInner, kWidth, 1), up(kind, kCount * kInner, kWidth, 2);
        const Weights down(kind, kCount * kWidth, kInner, 3);
        body(stack_of(gate), stack_of(up), stack_of(down));
    }
}

}  // namespace

TEST(experts_by_halves_give_the_same_bits) {
    on_each_isa([] {
        const auto x = random_floats(9 * kWidth, 4, -0.3f, 0.3f), logits = random_floats(9 * kCount, 5, -2, 2);
        on_each_kind([&](const Matrix& gate, const Matrix& up, const Matrix& down) {
            CHECK(mix_by_halves(gate, up, down, x, logits) == mix(gate, up, down, x, logits), "kind %d", int(gate.kind));
        });
    });
}

TEST(experts_match_float64) {
    on_each_isa([] {
        const Weights gate(Kind::f32, kCount * kInner, kWidth, 1), up(Kind::f32, kCount * kInner, kWidth, 2);
        const Weights down(Kind::f32, kCount * kWidth, kInner, 3);
        const int64_t rows = 9;
        const auto x = random_floats(rows * kWidth, 4, -0.3f, 0.3f), logits = random_floats(rows * kCount, 5, -2, 2);
        const Floats correction{0, 0.4f, 0, -0.4f, 0};
        const auto y = mix(stack_of(gate), stack_of(up), stack_of(down), x, logits, correction.data());
        const auto dot = [](const float* a, const float* b, int64_t count) {
            double sum = 0;
            for (int64_t i = 0; i < count; ++i) sum += double(a[i]) * b[i];
            return sum;
        };
        std::vector<double> wanted(rows * kWidth);
        for (int64_t t = 0; t < rows; ++t) {
            std::vector<double> shares;
            double all = 0, weights = 0;
            for (int e = 0; e < kCount; ++e) shares.push_back(std::exp(logits[t * kCount + e])), all += shares[e];
            std::vector<int> chosen{0, 1, 2, 3, 4};
            std::stable_sort(chosen.begin(), chosen.end(), [&](int a, int b) {
                return shares[a] / all + correction[a] > shares[b] / all + correction[b];
            });
            for (int r = 0; r < kPerRow; ++r) weights += shares[chosen[r]];
            for (int r = 0; r < kPerRow; ++r) {
                const int e = chosen[r];
                Floats hidden;
                for (int64_t f = e * kInner; f < (e + 1) * kInner; ++f) {
                    const double g = dot(&gate.values[f * kWidth], &x[t * kWidth], kWidth);
                    hidden.push_back(g / (1 + std::exp(-g)) * dot(&up.values[f * kWidth], &x[t * kWidth], kWidth));
                }
                for (int64_t o = 0; o < kWidth; ++o)
                    wanted[t * kWidth + o] += shares[e] / weights * dot(&down.values[(e * kWidth + o) * kInner], hidden.data(), kInner);
            }
        }
        CHECK(off(y.data(), wanted.data(), wanted.size()) < 1e-5, "%g", off(y.data(), wanted.data(), wanted.size()));
    });
}

// Whoever shares its experts, and however many threads there are.
TEST(experts_give_each_row_the_bits_it_gets_alone) {
    const int threads = num_threads();
    on_each_isa([] {
        on_each_kind([](const Matrix& gate, const Matrix& up, const Matrix& down) {
            const auto x = random_floats(70 * kWidth, 4), logits = random_floats(70 * kCount, 5, -2, 2);
            set_num_threads(3);
            const auto together = mix(gate, up, down, x, logits, nullptr, false);
            set_num_threads(1);
            for (int64_t t = 0; t < 70; ++t) {
                const auto alone = mix(gate, up, down, rows_of(x, kWidth, t, t + 1), rows_of(logits, kCount, t, t + 1), nullptr, false);
                CHECK(!std::memcmp(alone.data(), &together[t * kWidth], kWidth * sizeof(float)), "row %d, kind %d", int(t), int(gate.kind));
            }
        });
    });
    set_num_threads(threads);
}

TEST(experts_of_equal_logits_are_the_first_ones) {
    on_each_isa([] {
        on_each_kind([](const Matrix& gate, const Matrix& up, const Matrix& down) {
            const auto x = random_floats(kWidth, 4);
            const auto equal = mix(gate, up, down, x, {1, 1, 1, 1, 1});
            const auto first = mix(gate, up, down, x, {1, 1, -50, -50, -50});
            CHECK(!std::memcmp(equal.data(), first.data(), kWidth * sizeof(float)), "kind %d", int(gate.kind));
        });
    });
    mix({}, {}, {}, {}, {});
}

// By way of tile registers, parts of rows have the same bits.
void check_tiles_of_parts(void (*tiled_matmul)(const Linear&)) {
    const Quantized w(kCount * kInner, kWidth, 4, 64, false, 1);
    const Matrix m = stack_of(w);
    const auto x = random_floats(40 * kWidth, 2);
    const Part parts[] = {{0, 17, 1}, {17, 3, 3}, {20, 20, 4}};
    std::vector<int32_t> source;
    for (int i = 0; i < 40; ++i) source.push_back(39 - i);
    const float* bias = nullptr;
    Floats plain(40 * kInner), tiled(40 * kInner, -7.0f);
    float *to_plain = plain.data(), *to_tiled = tiled.data();
    quantized_matmul({x.data(), 40, 1, &m, &bias, &to_plain, false, parts, 3, source.data()});
    tiled_matmul({x.data(), 40, 1, &m, &bias, &to_tiled, false, parts, 3, source.data()});
    CHECK(!std::memcmp(plain.data(), tiled.data(), plain.size() * sizeof(float)));
}

TEST(tile_matmul_of_parts) {
    on_each_isa([] { check_tiles_of_parts(tile_matmul); });
#if defined(TINY_X86_SETS)
    if (can_emulate_tiles()) with_tiles_emulated([] { check_tiles_of_parts(amx::tile_matmul); });
#endif
}
