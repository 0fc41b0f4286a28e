#include "attention_plan.h"

#include <algorithm>

namespace tiny_llm {
namespace {

constexpr int64_t kRows = 256;           // query rows of one key head that share a span of keys
constexpr int64_t kMostRecords = 32768;  // of partial sums: a bound on memory, not on what can be computed

// Each finds the first integer that cannot be and says so, or returns "".
std::string check_starts(const AttendStep& s) {
    for (int64_t b = 0; b < s.sequences; ++b)
        if (s.starts[b] > s.starts[b + 1]) return "starts fall after sequence " + std::to_string(b);
    if (s.starts[0] != 0 || s.starts[s.sequences] != s.rows)
        return "starts go from " + std::to_string(s.starts[0]) + " to " + std::to_string(s.starts[s.sequences]) +
               ", expected 0 to " + std::to_string(s.rows);
    return "";
}

std::string check_slots(const AttendStep& s) {
    for (int64_t w = 0; w < s.writes; ++w)
        if (s.slots[w] < -1 || s.slots[w] >= s.blocks * s.block_size)
            return "slot " + std::to_string(s.slots[w]) + " of row " + std::to_string(w) + " is not in the pool of " +
                   std::to_string(s.blocks) + " blocks";
    return "";
}

std::string check_sequence(const AttendStep& s, int64_t b) {
    const int64_t rows = s.starts[b + 1] - s.starts[b], context = s.context_lens[b];
    const std::string name = "sequence " + std::to_string(b) + ": ";
    if (context < rows || context > s.table_width * s.block_size)
        return name + "context_len " + std::to_string(context) + ", expected " + std::to_string(rows) + " to " +
               std::to_string(s.table_width * s.block_size);
    const int32_t* table = s.tables + b * s.table_width;
    for (int64_t i = 0; i * s.block_size < context; ++i)
        if (table[i] < 0 || table[i] >= s.blocks)
            return name + "block " + std::to_string(table[i]) + " of " + std::to_string(s.blocks);
    return "";
}

int64_t spans_of(const AttendItem& item) { return (item.position + item.rows + kSpan - 1) / kSpan; }

// The rows of sequence b in pieces that share their keys; the longest contexts first.
void add_pieces(const AttendStep& s, int64_t b, std::vector<AttendItem>& items) {
    const int64_t begin = s.starts[b], end = s.starts[b + 1];
    const int64_t step = std::max<int64_t>(1, kRows / (s.query_heads / s.heads));
    for (int64_t row = begin + (end - begin - 1) / step * step; row >= begin; row -= step) {
        AttendItem item{b, row, std::min(step, end - row), s.context_lens[b] - (end - row), 0, 0, -1};
        item.spans = spans_of(item);
        items.push_back(item);
    }
}

// An item that is more than half of a thread's share of the work becomes one for each of its spans.
void split(const AttendStep& s, int threads, AttendPlan& plan) {
    int64_t total = 0;
    for (const auto& item : plan.items) total += item.rows * item.spans;
    std::vector<AttendItem> whole;
    whole.swap(plan.items);
    for (AttendItem item : whole) {
        const int64_t records = item.rows * s.query_heads * item.spans;
        const bool large = 2 * threads * item.rows * item.spans > s.heads * total;
        if (threads == 1 || item.spans < 2 || !large || plan.records + records > kMostRecords) {
            plan.items.push_back(item);
            continue;
        }
        plan.merges.push_back({item.row, item.rows, item.position, item.spans, plan.records});
        for (int64_t span = 0, count = item.spans; span < count; ++span) {
            item.first_span = span, item.spans = 1, item.partial = plan.records;
            plan.items.push_back(item);
            plan.records += item.rows * s.query_heads;
        }
    }
}

}  // namespace

AttendPlan plan_attend(const AttendStep& s, int threads) {
    AttendPlan plan;
    plan.fault = check_starts(s);
    if (plan.fault.empty()) plan.fault = check_slots(s);
    if (!plan.fault.empty()) {
        plan.items.push_back({0, 0, s.rows, 0, 0, 0, -1});
        return plan;
    }
    for (int64_t b = 0; b < s.sequences; ++b) {
        if (s.starts[b] == s.starts[b + 1]) continue;
        const std::string fault = check_sequence(s, b);
        if (fault.empty()) {
            add_pieces(s, b, plan.items);
        } else {
            plan.items.push_back({b, s.starts[b], s.starts[b + 1] - s.starts[b], 0, 0, 0, -1});
            if (plan.fault.empty()) plan.fault = fault;
        }
    }
    split(s, threads, plan);
    return plan;
}

}  // namespace tiny_llm
