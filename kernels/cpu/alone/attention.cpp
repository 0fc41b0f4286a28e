// Attention of one sequence as a small library with a C interface; see quantized_rows.cpp.
#include "attention.h"

#include "one_thread.h"

namespace tiny_llm::TINY_ISA { void attend(const Attend& args); }

// One sequence's new rows, the last of which stands at its last key. q, out [T, H, D]; keys [N, K, D, S] and
// values [N, K, S, D], found by a table of so many `blocks`; scales [N, K, S] of float16, or null.
extern "C" void attention(const float* q, float* keys, float* values, void* key_scales, void* value_scales,
                          const int32_t* table, float* out, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                          int64_t blocks, int64_t block_size, int64_t context, int64_t window, float scale) {
    using namespace tiny_llm;
    const KvPool pool{keys, values, KvType::f32, blocks, kv_heads, dim, block_size, key_scales, value_scales};
    const int64_t together = 256 * kv_heads < heads ? 1 : 256 * kv_heads / heads;  // as plan_attend has it
    for (int64_t row = 0; row < rows; row += together) {
        AttendItem item{0, row, rows - row < together ? rows - row : together, context - rows + row, 0, 0, -1};
        if (item.position >= window) item.first_span = (item.position - window + 1) / kSpan;
        item.spans = (item.position + item.rows + kSpan - 1) / kSpan - item.first_span;
        TINY_ISA::attend({q, out, pool, table, blocks, heads, window, scale, &item, nullptr, nullptr, nullptr, 0, 1, 0, 0});
    }
}
