// What attention is to compute: checks a step's integers, and cuts the work into items.
#pragma once

#include <string>
#include <vector>

#include "attention.h"

namespace tiny_llm {

struct AttendStep {
    const int32_t *slots, *tables, *starts, *context_lens;  // [W], [B, table_width], [B + 1], [B]
    int64_t writes, sequences, table_width, rows;           // W, B, table_width, T
    int64_t blocks, block_size, heads, query_heads;         // N, S, K, H
    int64_t window = INT64_MAX;                             // keys that a row sees, at least 1
};

struct AttendPlan {
    std::vector<AttendItem> items;  // the first `shared` of them are over spans that sequences share
    std::vector<AttendMerge> merges;
    std::vector<AttendPrior> priors;
    std::vector<int32_t> shared_rows;
    int64_t shared = 0, records = 0;
    std::string fault;  // the first integer that cannot be; its sequence's rows become NaN
};

AttendPlan plan_attend(const AttendStep& step, int threads);

// The call over q [T, H, D]; what is planned and what is pointed to must outlive it.
Attend attend_call(const AttendStep& step, const AttendPlan& plan, const KvPool& pool, const float* q, float scale, float* out);

}  // namespace tiny_llm
