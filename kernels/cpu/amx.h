// Tile registers: up to 16 rows of int8 times the weights of 16 outputs, exact in int32. Kernel files only.
//
// AMX where this file is compiled for it; elsewhere the same in plain C++, so that what uses it is tested on any
// processor. Its instructions are written out: GCC's names for them do not say which memory they read and write, and
// want the numbers of registers as literals.
#pragma once

#include <stdint.h>
#include <string.h>

#include "matrix.h"

namespace tiny_llm::TINY_ISA {

constexpr int kMostTileRows = 16, kSums = kMostTileRows * kTile;

// Registers 0 to 3 hold sums, [rows][16] each; (4, 5) and (6, 7) are pairs of what is multiplied. All have one shape as
// long as this lives: setting shapes takes as long as ten products.
class Tiles {
public:
    // `bytes`: inputs of a row that a register holds, 32 or 64.
    Tiles(int rows, int bytes) : rows_(rows), bytes_(bytes) {
#if defined(__AMX_INT8__)
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int t = 0; t < 8; ++t) {
            const bool x = t == 4 || t == 6, weights = t == 5 || t == 7;
            config.rows[t] = (uint8_t)(weights ? bytes / 4 : rows), config.row_bytes[t] = (uint16_t)(x ? bytes : kLine);
        }
        asm volatile("ldtilecfg %0" : : "m"(config));
#endif
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // Sums number S become 0.
    template <int S>
    [[gnu::always_inline]] void clear() {
#if defined(__AMX_INT8__)
        asm volatile("tilezero %%tmm%c0" : : "i"(S));
#else
        memset(sums_[S], 0, sizeof sums_[S]);
#endif
    }

    // Adds to sums number S the products of x [rows][stride], of which `bytes` count, with weights [bytes / 4][16][4].
    template <int S, int Pair>
    [[gnu::always_inline]] void add(const char* x, int64_t stride, const char* weights) {
#if defined(__AMX_INT8__)
        constexpr int A = 4 + 2 * Pair, B = A + 1;
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(x), "r"(stride), "i"(A) : "memory");
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(weights), "r"((int64_t)kLine), "i"(B) : "memory");
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(A), "i"(B));
#else
        for (int r = 0; r < rows_; ++r)
            for (int k = 0; k < bytes_; ++k) {
                const int value = ((const int8_t*)x)[r * stride + k];
                for (int o = 0; o < kTile; ++o)
                    sums_[S][r][o] += value * ((const uint8_t*)weights)[k / 4 * kLine + o * 4 + k % 4];
            }
#endif
    }

    // Sums number S go to to[S], as [rows][16].
    template <int S>
    [[gnu::always_inline]] void store(int32_t (&to)[4][kSums]) const {
#if defined(__AMX_INT8__)
        asm volatile("tilestored %%tmm%c2, %c3(%0,%1,1)"
                     : : "r"(to), "r"((int64_t)kLine), "i"(S), "i"(S * sizeof to[0]) : "memory");
#else
        memcpy(to[S], sums_[S], rows_ * kLine);
#endif
    }

    // Until they are released, the system saves tiles whenever another process has its turn.
    ~Tiles() {
#if defined(__AMX_INT8__)
        asm volatile("tilerelease");
#endif
    }

private:
    [[maybe_unused]] int rows_, bytes_;
#if !defined(__AMX_INT8__)
    int32_t sums_[4][kMostTileRows][kTile];
#endif
};

}  // namespace tiny_llm::TINY_ISA
