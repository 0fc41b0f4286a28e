#include "../pack.h"
#include "../quantized_matmul.h"
#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

// A matrix of random q, scales and biases (float32), packed, and its weights in float64.
struct Case {
    std::vector<uint8_t> packed;
    std::vector<double> weights;
    Matrix matrix;
};

Case make(int64_t rows, int64_t columns, int bits, int group, bool exact) {
    std::mt19937 generator(static_cast<uint32_t>(rows * 31 + columns + bits));
    const int64_t groups = columns / group, row_bytes = columns * bits / 8;
    const auto scales = random_floats(rows * groups, 1, 0.01f, 0.1f), biases = random_floats(rows * groups, 2);
    std::vector<uint8_t> values(rows * row_bytes, 0);
    Case made;
    made.weights.resize(rows * columns);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k) {
            const uint32_t q = generator() & ((1u << bits) - 1);
            for (int bit = 0; bit < bits; ++bit)
                if (q >> bit & 1) values[r * row_bytes + (k * bits + bit) / 8] |= 1 << ((k * bits + bit) % 8);
            const int64_t g = r * groups + k / group;
            made.weights[r * columns + k] = double(scales[g]) * q + double(biases[g]);
        }
    made.matrix = {nullptr, rows, columns, bits <= 4 ? Kind::q4 : Kind::q8, Kind::f32, group, exact};
    made.packed.assign(tiles(made.matrix) * tile_bytes(made.matrix) + 64, 0);
    auto* data = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(made.packed.data()) + 63) / 64 * 64);
    made.matrix.data = reinterpret_cast<char*>(data);
    const auto bytes = [](const std::vector<float>& v) { return reinterpret_cast<const uint8_t*>(v.data()); };
    pack_quantized({values.data(), bytes(scales), bytes(biases), bits}, made.matrix, data);
    return made;
}

std::vector<float> product(const Matrix& matrix, const float* x, int64_t rows) {
    std::vector<float> out(rows * matrix.rows);
    const float* bias = nullptr;
    float* to = out.data();
    quantized_matmul({x, rows, 1, &matrix, &bias, &to, false});
    return out;
}

double error(const Case& c, const std::vector<float>& x, int64_t rows) {
    std::vector<double> expected(rows * c.matrix.rows, 0.0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < c.matrix.rows; ++o)
            for (int64_t k = 0; k < c.matrix.columns; ++k)
                expected[r * c.matrix.rows + o] += x[r * c.matrix.columns + k] * c.weights[o * c.matrix.columns + k];
    return off(product(c.matrix, x.data(), rows).data(), expected.data(), expected.size());
}

}  // namespace

TEST(quantized_matmul_matches_float64) {
    on_each_isa([] {
        for (int bits : {2, 3, 4, 6, 8})
            for (int group : {32, 64, 128})
                for (bool exact : {true, false})
                    for (int64_t rows : {1, 3, 13, 31}) {
                        const Case c = make(37, 256, bits, group, exact);
                        const double e = error(c, random_floats(rows * 256, 5), rows);
                        CHECK(e < (exact ? 2e-6 : 0.02), "bits %d group %d rows %d: %g", bits, group, int(rows), e);
                    }
    });
}

TEST(quantized_matmul_gives_a_row_the_same_bits_in_any_company) {
    on_each_isa([] {
        for (bool exact : {true, false}) {
            const Case c = make(50, 384, 4, 64, exact);
            const auto x = random_floats(40 * 384, 6);
            const auto together = product(c.matrix, x.data(), 40);
            for (int64_t row = 0; row < 40; ++row) {
                const auto alone = product(c.matrix, x.data() + row * 384, 1);
                CHECK(std::equal(alone.begin(), alone.end(), together.begin() + row * 50), "row %d", int(row));
            }
        }
    });
}

TEST(quantized_matmul_keeps_a_number_that_is_not_finite_in_its_row) {
    on_each_isa([] {
        const Case c = make(16, 128, 4, 64, false);
        auto x = random_floats(3 * 128, 7);
        const auto clean = product(c.matrix, x.data(), 3);
        for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
            x[128 + 5] = bad;
            const auto out = product(c.matrix, x.data(), 3);
            CHECK(std::isnan(out[16]) && std::isnan(out[31]), "the row of %g", double(bad));
            CHECK(std::equal(out.begin(), out.begin() + 16, clean.begin()), "the row before");
            CHECK(std::equal(out.begin() + 32, out.end(), clean.begin() + 32), "the row after");
        }
    });
}
