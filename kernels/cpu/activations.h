// A block of rows of x as the quantized kernels read them. Kernel files only.
#pragma once

#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {

struct Activations {
    const float* x;        // [rows, columns]
    const int8_t* values;  // [rows, columns]; null where activations are exact
    const float* scales;   // [rows, groups]; NaN for a group with a number that is not finite
    const float* sums;     // [rows, groups], of values times scale, or of x where activations are exact
    int64_t columns, groups;

    Activations from(int64_t row) const {
        return {x + row * columns, values ? values + row * columns : nullptr, scales + row * groups,
                sums + row * groups, columns, groups};
    }
};

constexpr int64_t kGrain = 8192;  // values that one thread quantizes at a time

// Sixteen whole floats of at most 127 in size, as bytes.
static inline void store_bytes(int8_t* to, const vf* rounded, bool nibble_order) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    Bytes all;
    int8_t bytes[16];
    for (int v = 0; v < 16 / kWidth; ++v) {
        typedef int8_t Part __attribute__((vector_size(kWidth)));
        const Part part = __builtin_convertvector((vi)rounded[v] - 0x4b400000, Part);
        memcpy(bytes + v * kWidth, &part, kWidth);
    }
    memcpy(&all, bytes, 16);
    if (nibble_order) all = __builtin_shufflevector(all, all, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    memcpy(to, &all, 16);
}

// One group: x = scale * values, all to nearest. `nibble_order`: within each 8 inputs 0 2 4 6 1 3 5 7, as the low and
// then the high nibbles of a 4-bit line have them.
static inline void quantize_group(const float* x, int group, bool nibble_order, int8_t* values, float* scale,
                                  float* sum) {
    vi largest = {};
    for (int i = 0; i < group; i += kWidth) {
        const vi bits = (vi)load(x + i) & 0x7fffffff;  // sizes order as integers do, NaN above all
        largest = (vi)select(bits > largest, (vf)bits, (vf)largest);
    }
    int32_t most = 0;
    for (int i = 0; i < kWidth; ++i) most = largest[i] > most ? largest[i] : most;
    float size;
    memcpy(&size, &most, 4);
    const bool finite = most < 0x7f800000;
    const float inverse = finite && size > 1e-30f ? 127.0f / size : 0.0f;
    vi total = {};
    for (int i = 0; i < group; i += 16) {
        vf rounded[16 / kWidth];
        for (int v = 0; v < 16 / kWidth; ++v) {
            const vf scaled = finite ? load(x + i + v * kWidth) * splat(inverse) : vf{};
            rounded[v] = scaled + splat(12582912.0f);  // 1.5 * 2^23: the low bits are now the nearest integer
            total += (vi)rounded[v] - 0x4b400000;
        }
        store_bytes(values + i, rounded, nibble_order);
    }
    int32_t whole = 0;
    for (int i = 0; i < kWidth; ++i) whole += total[i];
    *scale = finite ? size / 127.0f : (float)NAN;
    *sum = *scale * (float)whole;
}

static inline float sum_group(const float* x, int group) {
    vf total = {};
    for (int i = 0; i < group; i += kWidth) total += load(x + i);
    return sum(total);
}

// Reads `rows` rows of x for matrices of this group size. The result lies in this thread's scratch.
static inline Activations read_activations(const float* x, int64_t rows, int64_t columns, int group, int bits,
                                           bool exact) {
    const int64_t groups = columns / group;
    const size_t bytes = (size_t)(rows * columns + 63) / 64 * 64;
    char* memory = (char*)scratch(0, (exact ? 0 : bytes) + 2 * sizeof(float) * rows * groups);
    float* scales = (float*)(memory + (exact ? 0 : bytes));
    float* sums = scales + rows * groups;
    int8_t* values = exact ? nullptr : (int8_t*)memory;
    parallel_for(rows * groups, kGrain / group, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float* from = x + i * group;
            if (exact) {
                sums[i] = sum_group(from, group);
            } else {
                quantize_group(from, group, bits == 4, values + i * group, scales + i, sums + i);
            }
        }
    });
    return {x, values, scales, sums, columns, groups};
}

}  // namespace tiny_llm::TINY_ISA
