#include "pack.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace tiny_llm {
namespace {

constexpr int64_t kStep = 256 * 1024;  // bytes of tiles that a thread takes at a time

template <class Body>
void for_tiles(const Matrix& matrix, const Body& body) {
    parallel_chunks(tiles(matrix), 1 + kStep / (1 + tile_bytes(matrix)), [](void* context, int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) (*static_cast<const Body*>(context))(tile);
    }, const_cast<void*>(static_cast<const void*>(&body)));
}

// Eight weights as a q4 word or as the two words of q8.
template <int Bits>
uint64_t octet(const uint8_t* from) {
    uint64_t all = 0, out = 0;
    std::memcpy(&all, from, Bits);
    if (Bits == 4) return all;
    for (int k = 0; k < 8; ++k) {
        const uint64_t q = all >> (Bits * k) & ((1u << Bits) - 1);
        out |= q << (Bits < 4 ? 4 * k : 8 * (k / 2) + 32 * (k % 2));
    }
    return out;
}

// One group of all outputs: lines from rows of `stride` bytes.
template <int Bits>
void pack_lines(const uint8_t* from, int64_t stride, int64_t outputs, int group, uint32_t* line) {
    for (int k = 0; k < group; k += 8, from += Bits, line += Bits > 4 ? 2 * kTile : kTile)
        for (int64_t o = 0; o < outputs; ++o) {
            const uint64_t words = octet<Bits>(from + o * stride);
            line[o] = static_cast<uint32_t>(words);
            if (Bits > 4) line[kTile + o] = static_cast<uint32_t>(words >> 32);
        }
}

auto lines_of(int bits) {
    return bits == 2 ? pack_lines<2> : bits == 3 ? pack_lines<3> : bits == 4 ? pack_lines<4> :
           bits == 5 ? pack_lines<5> : bits == 6 ? pack_lines<6> : pack_lines<8>;
}

// One number of `size` bytes of each output, `stride` bytes apart, side by side.
void pack_numbers(const uint8_t* from, int64_t stride, int64_t outputs, int64_t size, uint8_t* to) {
    for (int64_t o = 0; o < outputs; ++o) {
        if (size == 2) std::memcpy(to + o * 2, from + o * stride, 2);
        if (size == 4) std::memcpy(to + o * 4, from + o * stride, 4);
    }
}

void pack_tile(const QuantizedSource& source, const Matrix& m, int64_t index, uint8_t* out) {
    const int64_t first = index * kTile, outputs = std::min<int64_t>(kTile, m.rows - first);
    const int64_t groups = m.columns / m.group_size, size = bits_of(m.scales) / 8;
    const int64_t row = m.columns * source.bits / 8, numbers = groups * size;
    const uint8_t* values = source.values + first * row;
    const auto pack_lines = lines_of(source.bits);
    for (int64_t g = 0; g < groups; ++g, out += group_bytes(m), values += m.group_size * source.bits / 8) {
        pack_numbers(source.scales + first * numbers + g * size, numbers, outputs, size, out);
        pack_numbers(source.biases + first * numbers + g * size, numbers, outputs, size, out + kTile * size);
        pack_lines(values, row, outputs, m.group_size, reinterpret_cast<uint32_t*>(out + 2 * kTile * size));
    }
}

// `together`: how many inputs of an output lie side by side.
template <class T, int together>
void pack_dense_tile(const T* source, int64_t outputs, int64_t columns, T* out) {
    for (int64_t k = 0; k < columns; k += together)
        for (int64_t o = 0; o < kTile; ++o)
            for (int64_t i = k; i < k + together; ++i)
                *out++ = o < outputs && i < columns ? source[o * columns + i] : T{};
}

template <class T, int together>
void pack_dense_tiles(const void* source, const Matrix& m, void* out) {
    for_tiles(m, [&](int64_t tile) {
        const int64_t first = tile * kTile;
        pack_dense_tile<T, together>(static_cast<const T*>(source) + first * m.columns, m.rows - first, m.columns,
                                     static_cast<T*>(out) + tile * tile_bytes(m) / static_cast<int>(sizeof(T)));
    });
}

}  // namespace

void pack_dense(const void* source, const Matrix& matrix, void* out) {
    if (matrix.kind == Kind::f32) return pack_dense_tiles<uint32_t, 1>(source, matrix, out);
    if (matrix.kind == Kind::f16) return pack_dense_tiles<uint16_t, 1>(source, matrix, out);
    pack_dense_tiles<uint16_t, 2>(source, matrix, out);
}

void pack_quantized(const QuantizedSource& source, const Matrix& matrix, uint8_t* out) {
    for_tiles(matrix, [&](int64_t tile) { pack_tile(source, matrix, tile, out + tile * tile_bytes(matrix)); });
}

}  // namespace tiny_llm
