// Causal attention of a ragged batch over a pool of key and value blocks, and the write into that pool.
//
// Keys lie [N blocks, K heads, D, S]: the S keys of a block side by side for one d. Values lie [N, K, S, D].
//
// Where there is a window, a row sees its last tokens only: spans before these are not read, and in the first one
// that is, the keys before them count for nothing.
//
// A row's bits depend on its own context alone. The keys are cut at absolute multiples of kSpan; each span
// is a softmax of its own, in one order; spans are merged in theirs. How many rows are computed together,
// how blocks lie in the pool and who computes which span changes nothing.
//
// AVX512-BF16 multiplies a pool of bf16 by queries and by weights that are rounded to bf16, and adds in float.
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

// Rows that are computed together, over some spans: of one sequence, or of several that share these blocks.
struct AttendItem {
    int64_t sequence, row, rows;  // rows of q: [row, row + rows)
    int64_t position;             // of the first one
    int64_t first_span, spans;    // no spans: the rows become NaN
    int64_t partial;              // the first record of each head's partial sums, or -1: straight to `out`
    int64_t shared = -1;          // rows of several sequences: q's rows are Attend::shared_rows from here on
    int64_t prior = -1;           // the first of `first_span` records that the rows' sequence shares, or none
};

// The partial sums of some rows over the spans that follow `first_span`, to be merged into `out`.
struct AttendMerge {
    int64_t row, rows, position, first_span, spans, partial, prior;
};

// Where an item over one shared span leaves a sequence's records: its own, of `rows` rows, and the sequence's
// first row among those.
struct AttendPrior {
    int64_t partial, rows, at;
};

struct Attend {
    const float* q;  // [T, H, D]
    float* out;      // [T, H, D]
    KvPool pool;
    const int32_t* tables;  // [B, table_width] block numbers
    int64_t table_width, query_heads;
    int64_t window;  // keys that a row sees, at least 1
    float scale;
    const AttendItem* items;  // from plan_attend, as are these
    const AttendMerge* merges;
    const AttendPrior* priors;
    const int32_t* shared_rows;
    int64_t shared_count, item_count, merge_count, records;  // the first `shared_count` items go before the others
};

struct KvWrite {
    const float *k, *v;    // [W, K, D]
    const int32_t* slots;  // [W] block * S + offset; a row whose slot is not in the pool is not written
    int64_t rows;
    KvPool pool;
};

TINY_KERNEL(attend, Attend)
#if defined(TINY_X86_SETS)
namespace avx512bf16 { void attend(const Attend& args); }  // over a pool of bf16
#endif
TINY_KERNEL(kv_write, KvWrite)

}  // namespace tiny_llm
