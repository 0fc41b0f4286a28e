// Random quantized matrices, packed, for the tests of the ops that read them.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "../pack.h"
#include "check.h"

namespace tiny_llm::test {

// In MLX's format: a stream of `bits` a weight, from the low bits up; and as packed tiles.
struct Quantized {
    Quantized(int64_t outputs, int64_t inputs, int bits, int group, bool exact, uint32_t seed, Kind scales = Kind::f32)
        : layout{nullptr, outputs, inputs, bits > 4 ? Kind::q8 : Kind::q4, scales, group, exact},
          stream(outputs * inputs * bits / 8),
          tiles(std::aligned_alloc(64, tiny_llm::tiles(layout) * tile_bytes(layout)), std::free) {
        std::mt19937 draw(seed);
        for (int64_t i = 0; i < outputs * inputs; ++i) {
            q.push_back(draw() & ((1 << bits) - 1));
            for (int b = 0; b < bits; ++b) stream[(i * bits + b) / 8] |= (q[i] >> b & 1) << (i * bits + b) % 8;
        }
        scale = keep(random_floats(outputs * inputs / group, seed + 1, 0.5f, 1.5f));
        bias = keep(random_floats(outputs * inputs / group, seed + 2, -10, 0));
        const auto scale_bytes = stored(scale), bias_bytes = stored(bias);
        std::memset(tiles.get(), 0, tiny_llm::tiles(layout) * tile_bytes(layout));
        pack_quantized({stream.data(), scale_bytes.data(), bias_bytes.data(), bits}, layout,
                       static_cast<uint8_t*>(tiles.get()));
        layout.data = static_cast<const char*>(tiles.get());
    }

    double weight(int64_t o, int64_t i) const {
        const int64_t at = o * layout.columns + i;
        return double(scale[at / layout.group_size]) * q[at] + bias[at / layout.group_size];
    }

    Matrix layout;
    std::vector<uint8_t> stream;
    std::vector<int> q;              // [outputs, inputs]
    std::vector<float> scale, bias;  // [outputs, groups]
    std::unique_ptr<void, void (*)(void*)> tiles;

private:
    // Values that eight bits of fraction hold, as every kind has.
    static std::vector<float> keep(std::vector<float> values) {
        for (float& value : values) value = std::nearbyint(value * 16) / 16;
        return values;
    }
    std::vector<uint8_t> stored(const std::vector<float>& values) const {
        std::vector<uint8_t> bytes;
        for (float value : values) {
            uint32_t word;
            std::memcpy(&word, &value, 4);
            if (layout.scales == Kind::bf16) word >>= 16;
            if (layout.scales == Kind::f16)
                word = value ? (word >> 16 & 0x8000) | (((word & 0x7fffffff) >> 13) - (112 << 10)) : 0;
            for (int b = 0; b < bits_of(layout.scales) / 8; ++b) bytes.push_back(word >> (8 * b) & 255);
        }
        return bytes;
    }
};

}  // namespace tiny_llm::test
