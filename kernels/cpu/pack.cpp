#include "pack.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace tiny_llm {
namespace {

template <class Body>
void for_tiles(const Matrix& matrix, const Body& body) {
    parallel_chunks(tiles(matrix), 1 + (1 << 18) / (1 + tile_bytes(matrix)), [](void* context, int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) (*static_cast<const Body*>(context))(tile);
    }, const_cast<void*>(static_cast<const void*>(&body)));
}

// Copies the outputs' `size`-byte items number `item` side by side.
template <class T>
void interleave(const uint8_t* from, int64_t stride, int64_t outputs, int64_t item, uint8_t* to) {
    for (int64_t o = 0; o < outputs; ++o) std::memcpy(to + o * sizeof(T), from + o * stride + item * sizeof(T), sizeof(T));
}

void interleave(const uint8_t* from, int64_t stride, int64_t outputs, int64_t item, int64_t size, uint8_t* to) {
    if (size == 4) return interleave<uint32_t>(from, stride, outputs, item, to);
    interleave<uint16_t>(from, stride, outputs, item, to);
}

// Row by row from a width that no kernel reads to the next wider one that one does.
void widen(const uint8_t* from, int64_t columns, int bits, int to_bits, uint8_t* to) {
    uint32_t held = 0;
    int count = 0;
    for (int64_t i = 0; i < columns; ++i) {
        for (; count < bits; count += 8) held |= static_cast<uint32_t>(*from++) << count;
        const uint32_t value = held & ((1u << bits) - 1);
        held >>= bits, count -= bits;
        if (to_bits == 8) {
            to[i] = static_cast<uint8_t>(value);
        } else {
            to[i / 2] = static_cast<uint8_t>(i % 2 ? to[i / 2] | value << 4 : value);
        }
    }
}

void pack_tile(const QuantizedSource& source, const Matrix& m, int64_t index, uint8_t* out) {
    const int64_t first = index * kTile, outputs = std::min<int64_t>(kTile, m.rows - first);
    const int64_t size = bits_of(m.scales) / 8, scale_row = m.columns / m.group_size * size, lines = m.group_size * bits_of(m.kind) / 32;
    const int64_t wide_row = m.columns * bits_of(m.kind) / 8, source_row = m.columns * source.bits / 8;
    const uint8_t* values = source.values + first * source_row;
    if (source.bits != bits_of(m.kind)) {
        auto* wide = static_cast<uint8_t*>(scratch(0, kTile * wide_row));
        for (int64_t o = 0; o < outputs; ++o)
            widen(values + o * source_row, m.columns, source.bits, bits_of(m.kind), wide + o * wide_row);
        values = wide;
    }
    for (int64_t g = 0; g < m.columns / m.group_size; ++g, out += group_bytes(m)) {
        interleave(source.scales + first * scale_row, scale_row, outputs, g, size, out);
        interleave(source.biases + first * scale_row, scale_row, outputs, g, size, out + kTile * size);
        uint8_t* line = out + 2 * kTile * size;
        for (int64_t l = 0; l < lines; ++l, line += 4 * kTile)
            interleave<uint32_t>(values, wide_row, outputs, g * lines + l, line);
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
