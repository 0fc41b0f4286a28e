// Random dense matrices, packed, for the tests of the ops that read them.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "../pack.h"
#include "check.h"

namespace tiny_llm::test {

constexpr Kind kDenseKinds[] = {Kind::f32, Kind::bf16, Kind::f16};

// Of values that their kind can hold.
struct Weights {
    Weights(Kind kind, int64_t outputs, int64_t inputs, uint32_t seed)
        : values(random_floats(outputs * inputs, seed)),
          layout{nullptr, outputs, inputs, kind, kind, 0, true},
          tiles(std::aligned_alloc(64, tiny_llm::tiles(layout) * tile_bytes(layout) + 64), std::free) {
        std::vector<char> stored;
        for (float& value : values) keep(value, stored);
        pack_dense(stored.data(), layout, tiles.get());
        layout.data = static_cast<const char*>(tiles.get());
    }

    std::vector<float> values;  // [outputs, inputs]
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

}  // namespace tiny_llm::test
