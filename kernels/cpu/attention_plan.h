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
};

struct AttendPlan {
    std::vector<AttendItem> items;
    std::vector<AttendMerge> merges;
    int64_t records = 0;
    std::string fault;  // the first integer that cannot be; its sequence's rows become NaN
};

AttendPlan plan_attend(const AttendStep& step, int threads);

}  // namespace tiny_llm
