#include "attention.h"

#include <math.h>
#include <string.h>

#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {
namespace {

void narrow(const float* from, float* to, int64_t n) { memcpy(to, from, n * sizeof(float)); }

template <class T>
void narrow(const float* from, T* to, int64_t n) {
    T last[kWidth];
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
    if (i == n) return;
    vf rest = {};
    for (int64_t j = i; j < n; ++j) rest[j - i] = from[j];
    store(last, rest);
    memcpy(to + i, last, (n - i) * sizeof(T));
}

template <class T>
void write_head(const KvWrite& w, int64_t head) {
    const int64_t dim = w.pool.dim, size = w.pool.block_size;
    T row[kMostHeadDim];
    for (int64_t i = 0; i < w.rows; ++i) {
        const int64_t slot = w.slots[i];
        if (slot < 0 || slot >= w.pool.blocks * size) continue;
        const int64_t from = (i * w.pool.heads + head) * dim, block = (slot / size * w.pool.heads + head) * dim * size;
        narrow(w.k + from, row, dim);
        T* keys = static_cast<T*>(w.pool.keys) + block + slot % size;
        for (int64_t d = 0; d < dim; ++d) keys[d * size] = row[d];
        narrow(w.v + from, static_cast<T*>(w.pool.values) + block + slot % size * dim, dim);
    }
}

// A vector's integers, and the float16 that they are multiples of: its largest becomes 127.
f16 quantize(const float* from, int64_t dim, int8_t* to) {
    float most = 0;
    for (int64_t d = 0; d < dim; ++d)
        if (!(fabsf(from[d]) <= most) && most == most) most = fabsf(from[d]);  // a NaN stays
    const f16 unit{round_f16(most / 127.0f)};
    const float scale = to_float(unit);
    for (int64_t d = 0; d < dim; ++d) {
        const float x = scale > 0 ? rintf(from[d] / scale) : 0.0f;
        to[d] = (int8_t)(!(x > -127.0f) ? -127.0f : x < 127.0f ? x : 127.0f);
    }
    return unit;
}

template <>
void write_head<int8_t>(const KvWrite& w, int64_t head) {
    const int64_t dim = w.pool.dim, size = w.pool.block_size;
    int8_t row[kMostHeadDim];
    for (int64_t i = 0; i < w.rows; ++i) {
        const int64_t slot = w.slots[i];
        if (slot < 0 || slot >= w.pool.blocks * size) continue;
        const int64_t from = (i * w.pool.heads + head) * dim, block = slot / size * w.pool.heads + head;
        const int64_t at = block * size + slot % size;
        static_cast<f16*>(w.pool.key_scales)[at] = quantize(w.k + from, dim, row);
        int8_t* keys = static_cast<int8_t*>(w.pool.keys) + block * dim * size + slot % size;
        for (int64_t d = 0; d < dim; ++d) keys[d * size] = row[d];
        static_cast<f16*>(w.pool.value_scales)[at] =
            quantize(w.v + from, dim, static_cast<int8_t*>(w.pool.values) + at * dim);
    }
}

}  // namespace

// A head is one thread's, so that of two rows for one slot the later one stays.
void kv_write(const KvWrite& w) {
    const int64_t grain = 1 + 4096 / (w.rows * w.pool.dim + 1);
    parallel_for(w.pool.heads, grain, [&](int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) {
            if (w.pool.type == KvType::f32) {
                write_head<float>(w, head);
            } else if (w.pool.type == KvType::bf16) {
                write_head<bf16>(w, head);
            } else if (w.pool.type == KvType::i8) {
                write_head<int8_t>(w, head);
            } else {
                write_head<f16>(w, head);
            }
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
