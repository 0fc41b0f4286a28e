// Tile registers: up to 16 rows of int8 times a group's weights, exact in int32. Kernel files only.
//
// AMX where this file is compiled for it; elsewhere the same in plain C++, so that what uses it is tested on any
// processor.
#pragma once

#include <stdint.h>
#include <string.h>

#include "matrix.h"

#if defined(__AMX_INT8__)
#include <immintrin.h>
#endif

namespace tiny_llm::TINY_ISA {

constexpr int kMostTileRows = 16;

// Holds sums[rows][16]. Weights are lines of 64 bytes, four inputs of each output in one (matrix.h).
class Tiles {
public:
    // `bytes`: inputs that add() takes, 32 or 64.
    Tiles(int rows, int bytes) : rows_(rows), bytes_(bytes) {
#if defined(__AMX_INT8__)
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        config.rows[0] = config.rows[1] = (uint8_t)rows, config.rows[2] = (uint8_t)(bytes / 4);
        config.row_bytes[0] = config.row_bytes[2] = 64, config.row_bytes[1] = (uint16_t)bytes;
        remember(&config);  // GCC 12 believes that eight bytes of it are read
        _tile_loadconfig(&config);
#endif
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    void clear() {
#if defined(__AMX_INT8__)
        _tile_zero(0);
#else
        memset(sums_, 0, sizeof sums_);
#endif
    }

    // Adds the products of x[rows][bytes], rows `stride` bytes apart, with weights [bytes / 4][16][4].
    void add(const void* x, int64_t stride, const void* weights) {
#if defined(__AMX_INT8__)
        remember(x);
        _tile_loadd(1, x, stride);
        _tile_loadd(2, weights, kLine);
        _tile_dpbsud(0, 1, 2);
#else
        for (int r = 0; r < rows_; ++r)
            for (int k = 0; k < bytes_; ++k) {
                const int value = ((const int8_t*)x)[r * stride + k];
                for (int o = 0; o < kTile; ++o)
                    sums_[r][o] += value * ((const uint8_t*)weights)[k / 4 * kLine + o * 4 + k % 4];
            }
#endif
    }

    void store(int32_t* to) const {  // [rows][16]
#if defined(__AMX_INT8__)
        _tile_stored(0, to, kLine);
#else
        memcpy(to, sums_, rows_ * sizeof sums_[0]);
#endif
    }

    // Until they are released, the system saves tiles whenever another process has its turn.
    ~Tiles() {
#if defined(__AMX_INT8__)
        _tile_release();
#endif
    }

private:
    // What was written must lie in memory before a tile is loaded from there, which the compiler does not see.
    static void remember(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

    [[maybe_unused]] int rows_, bytes_;
#if !defined(__AMX_INT8__)
    int32_t sums_[kMostTileRows][kTile];
#endif
};

}  // namespace tiny_llm::TINY_ISA
