#include "../pool.h"
#include "../quantized_matmul.h"
#include "../tile_matmul.h"
#include "quantized.h"
#include "tile_emulator.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

using Floats = std::vector<float>;

// x W^T + bias for each matrix, each [rows, O].
std::vector<Floats> multiply(const Floats& x, int64_t rows, const std::vector<const Quantized*>& weights,
                             const std::vector<Floats>& biases = {}, bool gated = false,
                             void (*kernel)(const Linear&) = quantized_matmul) {
    std::vector<Matrix> matrices;
    std::vector<Floats> out;
    std::vector<const float*> bias;
    std::vector<float*> to;
    for (const Quantized* weight : weights) {
        matrices.push_back(weight->layout);
        if (!gated || out.empty()) out.emplace_back(rows * weight->layout.rows, -7.0f);
    }
    for (size_t i = 0; i < weights.size(); ++i) bias.push_back(biases.empty() ? nullptr : biases[i].data());
    for (Floats& y : out) to.push_back(y.data());
    kernel({x.data(), rows, int(weights.size()), matrices.data(), bias.data(), to.data(), gated});
    return out;
}

// What int8 makes of x: one scale for each row and group.
std::vector<double> rounded(const Floats& x, int group) {
    std::vector<double> result;
    for (size_t i = 0; i < x.size(); i += group) {
        float most = 0;
        for (int k = 0; k < group; ++k) most = std::fmax(most, std::fabs(x[i + k]));
        const float inverse = most > 0 ? 127 / most : 0, scale = most / 127;
        for (int k = 0; k < group; ++k) result.push_back(double(scale) * std::nearbyint(x[i + k] * inverse));
    }
    return result;
}

// The results, and how large the numbers are of which they are sums: what rounding errors are measured by.
struct Expected {
    std::vector<double> y;
    double size = 0;

    double off(const Floats& got) const {
        double most = 0;
        for (size_t i = 0; i < y.size(); ++i) most = std::fmax(most, std::fabs(got[i] - y[i]));
        return most / size;
    }
};

Expected expected(const Floats& x, int64_t rows, const Quantized& w, const Floats& bias = {}) {
    const Matrix& m = w.layout;
    const std::vector<double> seen = m.exact ? std::vector<double>(x.begin(), x.end()) : rounded(x, m.group_size);
    Expected result{std::vector<double>(rows * m.rows)};
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < m.rows; ++o) {
            double sum = bias.empty() ? 0 : bias[o], size = 0;
            for (int64_t i = 0; i < m.columns; ++i) {
                sum += seen[r * m.columns + i] * w.weight(o, i);
                size += std::fabs(seen[r * m.columns + i] * w.weight(o, i));
            }
            result.y[r * m.rows + o] = sum;
            result.size = std::fmax(result.size, size);
        }
    return result;
}

template <class Body>
void on_each_format(const Body& body) {
    for (int bits : {4, 8})
        for (int group : {32, 64, 128})
            for (bool exact : {false, true}) body(bits, group, exact);
}

}  // namespace

TEST(quantized_matmul_matches_float64) {
    on_each_isa([] {
        on_each_format([](int bits, int group, bool exact) {
            for (Kind scales : {Kind::f32, Kind::bf16, Kind::f16})
                for (int64_t inputs : {group, 3 * group})
                    for (int64_t outputs : {1, 16, 37}) {
                        const Quantized w(outputs, inputs, bits, group, exact, 1, scales);
                        const auto bias = random_floats(outputs, 4);
                        for (int64_t rows : {1, 2, 5}) {
                            const auto x = random_floats(rows * inputs, 5, -3, 3);
                            const auto y = multiply(x, rows, {&w}, {bias})[0];
                            const auto wanted = expected(x, rows, w, bias);
                            CHECK(wanted.off(y) < 1e-6, "%d bits group %d exact %d O %d I %d T %d: %g", bits, group,
                                  exact, int(outputs), int(inputs), int(rows), wanted.off(y));
                        }
                    }
        });
    });
}

// The largest sums that there can be: no step of an int8 product may overflow.
TEST(quantized_matmul_holds_the_largest_products) {
    on_each_isa([] {
        on_each_format([](int bits, int group, bool exact) {
            Quantized w(16, 2 * group, bits, group, exact, 1);
            std::fill(w.q.begin(), w.q.end(), (1 << bits) - 1);
            std::fill(w.stream.begin(), w.stream.end(), 255);
            std::fill(w.scale.begin(), w.scale.end(), 1.0f);
            std::fill(w.bias.begin(), w.bias.end(), 0.0f);
            const auto* scale = reinterpret_cast<const uint8_t*>(w.scale.data());
            const auto* bias = reinterpret_cast<const uint8_t*>(w.bias.data());
            pack_quantized({w.stream.data(), scale, bias, bits}, w.layout, static_cast<uint8_t*>(w.tiles.get()));
            for (float value : {1.0f, -1.0f}) {
                const Floats x(3 * 2 * group, value);
                const auto y = multiply(x, 3, {&w})[0];
                CHECK(expected(x, 3, w).off(y) < 1e-6, "%d bits group %d", bits, group);
            }
        });
    });
}

// A row's bits depend on that row alone: not on how many there are, nor on threads, nor on what is fused.
TEST(quantized_matmul_gives_each_row_the_bits_it_gets_alone) {
    const int threads = num_threads();
    on_each_isa([] {
        on_each_format([](int bits, int group, bool exact) {
            const int64_t inputs = 6 * group;
            const Quantized a(40, inputs, bits, group, exact, 1), b(7, inputs, 12 - bits, group, exact, 2);
            const auto x = random_floats(70 * inputs, 3);
            std::vector<Floats> alone(2);
            set_num_threads(1);
            for (int64_t r = 0; r < 70; ++r) {
                const Floats row(x.begin() + r * inputs, x.begin() + (r + 1) * inputs);
                for (int i = 0; i < 2; ++i) {
                    const auto y = multiply(row, 1, {i ? &b : &a})[0];
                    alone[i].insert(alone[i].end(), y.begin(), y.end());
                }
            }
            set_num_threads(3);
            for (int64_t rows : {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 25, 31, 70}) {
                const auto both = multiply(x, rows, {&a, &b});
                for (int i = 0; i < 2; ++i)
                    CHECK(!std::memcmp(both[i].data(), alone[i].data(), both[i].size() * sizeof(float)), "%d rows, %d bits",
                          int(rows), bits);
            }
        });
    });
    set_num_threads(threads);
}

// By way of tile registers, a row has the same bits.
void check_tiles(void (*tiled_matmul)(const Linear&)) {
    on_each_format([=](int bits, int group, bool exact) {
        if (exact) return;
        for (int64_t rows : {1, 7, 8, 12, 16, 17, 25, 31, 35, 67}) {
            const int64_t inputs = (rows == 35 ? 41 : 3) * group;  // of several panels
            const Quantized a(40, inputs, bits, group, false, 1), b(23, inputs, 12 - bits, group, false, 2, Kind::bf16);
            const Quantized up(40, inputs, bits, group, false, 6, Kind::f16);
            const std::vector<Floats> biases{random_floats(40, 4), random_floats(40, 5)};
            auto x = random_floats(rows * inputs, 3);
            x[rows / 2 * inputs] = NAN;
            for (bool gated : {false, true}) {
                const auto with = [&](auto kernel) {
                    return gated ? multiply(x, rows, {&a, &up}, biases, true, kernel)
                                 : multiply(x, rows, {&a, &b}, biases, false, kernel);
                };
                const auto tiled = with(tiled_matmul), plain = with(quantized_matmul);
                for (size_t i = 0; i < plain.size(); ++i)
                    CHECK(!std::memcmp(tiled[i].data(), plain[i].data(), plain[i].size() * sizeof(float)),
                          "%d rows, %d bits, group %d, gated %d", int(rows), bits, group, gated);
            }
        }
    });
}

TEST(tile_matmul_gives_each_row_the_same_bits) {
    on_each_isa([] { check_tiles(tile_matmul); });
    tile_matmul({nullptr, 0, 1, nullptr, nullptr, nullptr, false});
}

#if defined(TINY_X86_SETS)
TEST(tile_matmul_by_tile_instructions) {
    if (can_emulate_tiles()) with_tiles_emulated([] { check_tiles(amx::tile_matmul); });
}

// Of 16 rows, 16 outputs and 64 inputs, one of each; shapes once for all that a thread takes at a time.
TEST(tile_matmul_wastes_no_tile_instruction) {
    if (!can_emulate_tiles() || best_isa() == Isa::amx) return;
    const TileCounts met = with_tiles_emulated([] {
        const Quantized gate(48, 5 * 64, 4, 64, false, 1), up(48, 5 * 64, 8, 64, false, 2);
        set_num_threads(1);
        multiply(random_floats(40 * 5 * 64, 3), 40, {&gate, &up}, {}, true, amx::tile_matmul);
    });
    const int64_t blocks = 3 * 3 * 5 * 2;
    CHECK(met.multiplied == blocks && met.cleared == blocks && met.stored == blocks && met.loaded == 2 * blocks,
          "%d of %d", int(met.multiplied), int(blocks));
    CHECK(met.configured == 1 && met.released == 1, "%d", int(met.configured));
}
#endif

// Enough for x to be cut into pieces that stay in cache.
TEST(quantized_matmul_of_many_wide_rows) {
    on_each_isa([] {
        for (bool exact : {false, true}) {
            const Quantized w(20, 8192, 4, 64, exact, 1);
            const auto x = random_floats(90 * 8192, 3);
            const auto y = multiply(x, 90, {&w})[0];
            for (int64_t r : {0, 44, 89}) {
                const auto row = multiply(Floats(x.begin() + r * 8192, x.begin() + (r + 1) * 8192), 1, {&w})[0];
                CHECK(!std::memcmp(row.data(), y.data() + r * 20, 20 * sizeof(float)), "row %d exact %d", int(r), exact);
            }
        }
    });
}

TEST(quantized_matmul_gates) {
    on_each_isa([] {
        on_each_format([](int bits, int group, bool exact) {
            const Quantized gate(21, 2 * group, bits, group, exact, 1), up(21, 2 * group, 12 - bits, group, exact, 2);
            const std::vector<Floats> biases{random_floats(21, 3), random_floats(21, 4)};
            const auto x = random_floats(15 * 2 * group, 5, -0.02f, 0.02f);
            const auto y = multiply(x, 15, {&gate, &up}, biases, true)[0];
            auto wanted = expected(x, 15, gate, biases[0]);
            const auto factor = expected(x, 15, up, biases[1]);
            for (size_t i = 0; i < y.size(); ++i) wanted.y[i] *= factor.y[i] / (1 + std::exp(-wanted.y[i]));
            CHECK(wanted.off(y) < 2e-6 * factor.size, "%d bits: %g", bits, wanted.off(y) / factor.size);
        });
    });
}

TEST(quantized_matmul_of_numbers_that_are_not_finite) {
    on_each_isa([] {
        on_each_format([](int bits, int group, bool exact) {
            const Quantized w(18, 2 * group, bits, group, exact, 1);
            auto x = random_floats(5 * 2 * group, 2);
            const auto before = multiply(x, 5, {&w})[0];
            x[1 * 2 * group + 3] = NAN;
            x[3 * 2 * group + group] = INFINITY;
            x[4 * 2 * group] = -INFINITY;
            const auto after = multiply(x, 5, {&w})[0];
            for (int r : {0, 2})
                CHECK(!std::memcmp(&before[r * 18], &after[r * 18], 18 * sizeof(float)), "row %d beside them", r);
            for (int r : {1, 3, 4})
                for (int o = 0; o < 18; ++o) CHECK(!std::isfinite(after[r * 18 + o]), "row %d is %g", r, after[r * 18 + o]);
        });
    });
}

TEST(quantized_matmul_of_nothing_and_next_to_nothing) {
    on_each_isa([] {
        on_each_format([](int bits, int group, bool exact) {
            const Quantized w(18, group, bits, group, exact, 1);
            CHECK(multiply({}, 0, {&w})[0].empty());
            for (float value : {0.0f, -0.0f, 1e-41f, 1e-35f}) {
                const auto y = multiply(Floats(group, value), 1, {&w})[0];
                for (float out : y) CHECK(std::fabs(out) <= 1e-30f, "x %g gives %g", value, out);
            }
        });
    });
}

// The weights that narrow widths stand for are those of the wider one that holds them.
TEST(pack_widens_what_no_kernel_reads) {
    for (int bits : {2, 3, 5, 6}) {
        const Quantized narrow(19, 192, bits, 64, false, 1);
        Quantized wide(19, 192, bits > 4 ? 8 : 4, 64, false, 1);
        const int width = bits_of(wide.layout.kind);
        for (size_t i = 0; i < narrow.q.size(); ++i) {
            uint8_t& byte = wide.stream[i * width / 8];
            byte = width == 8 ? narrow.q[i] : i % 2 ? (byte & 15) | narrow.q[i] << 4 : narrow.q[i];
        }
        const auto* scale = reinterpret_cast<const uint8_t*>(wide.scale.data());
        const auto* bias = reinterpret_cast<const uint8_t*>(wide.bias.data());
        pack_quantized({wide.stream.data(), scale, bias, width}, wide.layout, static_cast<uint8_t*>(wide.tiles.get()));
        CHECK(!std::memcmp(narrow.tiles.get(), wide.tiles.get(), tiles(wide.layout) * tile_bytes(wide.layout)), "%d bits", bits);
    }
}
