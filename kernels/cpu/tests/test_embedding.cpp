#include "../embedding.h"
#include "weights.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

std::vector<float> look_up(const Matrix& table, const std::vector<int32_t>& tokens) {
    std::vector<float> out(tokens.size() * table.columns, -7.0f);
    embedding({tokens.data(), static_cast<int64_t>(tokens.size()), table, out.data()});
    return out;
}

// MLX's format: rows of words, one scale and bias a group.
struct Quantized {
    std::vector<uint8_t> values;
    std::vector<float> scales, biases;
    std::vector<double> expected;
};

Quantized random_quantized(const Matrix& m) {
    const int bits = bits_of(m.kind);
    Quantized q{{}, random_floats(m.rows * m.columns / m.group_size, 1), {}, {}};
    q.biases = random_floats(q.scales.size(), 2);
    for (float byte : random_floats(m.rows * m.columns * bits / 8, 3, 0, 255)) q.values.push_back(uint8_t(byte));
    for (int64_t i = 0; i < m.rows * m.columns; ++i) {
        const int value = bits == 8 ? q.values[i] : q.values[i / 2] >> (i % 2 * 4) & 15;
        q.expected.push_back(double(q.scales[i / m.group_size]) * value + q.biases[i / m.group_size]);
    }
    return q;
}

}  // namespace

TEST(embedding_gives_the_rows_of_a_dense_table) {
    on_each_isa([] {
        for (Kind kind : kDenseKinds)
            for (int64_t columns : {1, 7, 64}) {
                const Weights table(kind, 21, columns, 1);
                const std::vector<int32_t> tokens{20, 0, 15, 16, 16, -1, 21, INT32_MAX, INT32_MIN};
                const int64_t rows[] = {20, 0, 15, 16, 16, 0, 20, 20, 0};
                const auto out = look_up(table.layout, tokens);
                for (size_t t = 0; t < tokens.size(); ++t)
                    for (int64_t i = 0; i < columns; ++i)
                        CHECK(out[t * columns + i] == table.values[rows[t] * columns + i], "id %d", tokens[t]);
            }
    });
}

TEST(embedding_unpacks_the_rows_of_a_quantized_table) {
    on_each_isa([] {
        for (Kind kind : {Kind::q4, Kind::q8})
            for (int group : {32, 64, 128}) {
                Matrix m{nullptr, 19, 256, kind, Kind::f32, group, false};
                const Quantized q = random_quantized(m);
                std::vector<uint64_t> packed(tiles(m) * tile_bytes(m) / 8);
                const auto* scales = reinterpret_cast<const uint8_t*>(q.scales.data());
                const auto* biases = reinterpret_cast<const uint8_t*>(q.biases.data());
                pack_quantized({q.values.data(), scales, biases, bits_of(kind)}, m,
                               reinterpret_cast<uint8_t*>(packed.data()));
                m.data = reinterpret_cast<const char*>(packed.data());
                std::vector<int32_t> tokens(19);
                for (int i = 0; i < 19; ++i) tokens[i] = i;
                const auto out = look_up(m, tokens);
                CHECK(off(out.data(), q.expected.data(), out.size()) < 2e-7, "%d bits", bits_of(kind));
            }
    });
}
