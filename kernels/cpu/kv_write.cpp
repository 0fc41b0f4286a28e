#include "attention.h"

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
            } else {
                write_head<f16>(w, head);
            }
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
