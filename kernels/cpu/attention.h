// Causal attention of a ragged batch over a pool of key and value blocks, and the write into that pool.
//
// Keys lie [N blocks, K heads, D, S]: the S keys of a block side by side for one d. Values lie [N, K, S, D].
//
// A row's bits depend on its own context alone. The keys are cut at absolute multiples of kSpan; each span
// is a softmax of its own, in one order; spans are merged in theirs. How many rows are computed together,
// how blocks lie in the pool and who computes which span changes nothing.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tiny_llm {

enum class KvType { f32, bf16, f16, i8 };

constexpr int64_t kSpan = 256;  // keys
constexpr int64_t kMostHeadDim = 1024;

struct KvPool {
    void *keys, *values;
    KvType type;
    int64_t blocks, heads, dim, block_size;  // N, K, D, S; S divides 64 and is at least 16
    void *key_scales, *value_scales;         // of i8: [N, K, S] float16, what a token's integers are multiples of
};

// Rows of one sequence that are computed together, over some of its spans.
struct AttendItem {
    int64_t sequence, row, rows;  // rows of q: [row, row + rows)
    int64_t position;             // of the first one
    int64_t first_span, spans;    // no spans: the rows become NaN
    int64_t partial;              // the first record of each head's partial sums, or -1: straight to `out`
};

// The spans' partial sums of some rows, to be merged into `out`.
struct AttendMerge {
    int64_t row, rows, position, spans, partial;
};

struct Attend {
    const float* q;  // [T, H, D]
    float* out;      // [T, H, D]
    KvPool pool;
    const int32_t* tables;  // [B, table_width] block numbers
    int64_t table_width, query_heads;
    float scale;
    const AttendItem* items;  // from plan_attend, as are these
    const AttendMerge* merges;
    int64_t item_count, merge_count, records;
};

struct KvWrite {
    const float *k, *v;    // [W, K, D]
    const int32_t* slots;  // [W] block * S + offset; a row whose slot is not in the pool is not written
    int64_t rows;
    KvPool pool;
};

TINY_KERNEL(attend, Attend)
TINY_KERNEL(kv_write, KvWrite)

}  // namespace tiny_llm
