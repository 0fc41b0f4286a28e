#include "attention_plan.h"

#include <algorithm>
#include <cstring>

namespace tiny_llm {
namespace {

constexpr int64_t kRows = 256;           // query rows of one key head that share a span of keys
constexpr int64_t kFewRows = 16;         // of a sequence that has its shared spans read with others'
constexpr int64_t kSharedRows = 512;     // query rows of one key head that read a shared span together
constexpr int64_t kMostRecords = 65536;  // of partial sums: a bound on memory, not on what can be computed

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

// The first key that the row at `position` sees.
int64_t first_key(const AttendStep& s, int64_t position) { return std::max<int64_t>(0, position - (s.window - 1)); }

int64_t spans_of(const AttendItem& item) { return (item.position + item.rows + kSpan - 1) / kSpan; }

// The records that each sequence's first spans have left in items that it shares with others.
using Priors = std::vector<std::vector<AttendPrior>>;

// Finds sequences whose tables begin with the same blocks: what they share is read once for all of them. Whole
// spans only, before the first new row, so that everybody sees all of them; groups may part from span to span.
class Sharing {
public:
    Sharing(const AttendStep& s, AttendPlan& plan, Priors& priors) : s_(s), plan_(plan), priors_(priors) {}

    void add(std::vector<int64_t> group, int64_t span) {
        const auto has_none = [&](int64_t b) { return (s_.context_lens[b] - rows(b)) / kSpan <= span; };
        group.erase(std::remove_if(group.begin(), group.end(), has_none), group.end());
        std::sort(group.begin(), group.end(), [&](int64_t a, int64_t b) {
            const int order = compare(a, b, span);
            return order ? order < 0 : a < b;
        });
        for (size_t begin = 0, end; begin < group.size(); begin = end) {
            for (end = begin + 1; end < group.size() && compare(group[begin], group[end], span) == 0;) ++end;
            if (end - begin < 2) continue;
            const std::vector<int64_t> same(group.begin() + begin, group.begin() + end);
            if (add_items(same, span)) add(same, span + 1);
        }
    }

private:
    int64_t rows(int64_t b) const { return s_.starts[b + 1] - s_.starts[b]; }

    int compare(int64_t a, int64_t b, int64_t span) const {
        const int64_t blocks = kSpan / s_.block_size;
        const int32_t* from = s_.tables + span * blocks;
        return std::memcmp(from + a * s_.table_width, from + b * s_.table_width, blocks * sizeof(int32_t));
    }

    // Whether there was room for the records.
    bool add_items(const std::vector<int64_t>& group, int64_t span) {
        int64_t count = 0;
        for (const int64_t b : group) count += rows(b);
        if (plan_.records + count * s_.query_heads > kMostRecords) return false;
        const int64_t most = std::max<int64_t>(kFewRows, kSharedRows / (s_.query_heads / s_.heads));
        for (size_t i = 0; i < group.size();) {
            AttendItem item{group[i], 0, 0, (span + 1) * kSpan - 1, span, 1, plan_.records};
            item.shared = plan_.shared_rows.size();
            const size_t first = i;
            for (; i < group.size() && item.rows + rows(group[i]) <= most; ++i) {
                priors_[group[i]].push_back({item.partial, 0, item.rows});
                for (int64_t row = s_.starts[group[i]]; row < s_.starts[group[i] + 1]; ++row) plan_.shared_rows.push_back(row);
                item.rows += rows(group[i]);
            }
            for (size_t j = first; j < i; ++j) priors_[group[j]].back().rows = item.rows;
            plan_.records += item.rows * s_.query_heads;
            plan_.items.push_back(item);
        }
        return true;
    }

    const AttendStep& s_;
    AttendPlan& plan_;
    Priors& priors_;
};

// The rows of sequence b in pieces that share their keys; the longest contexts first.
void add_pieces(const AttendStep& s, int64_t b, const std::vector<AttendPrior>& priors, AttendPlan& plan) {
    const int64_t begin = s.starts[b], end = s.starts[b + 1];
    const int64_t step = std::max<int64_t>(1, kRows / (s.query_heads / s.heads));
    const int64_t prior = priors.empty() ? -1 : plan.priors.size();
    plan.priors.insert(plan.priors.end(), priors.begin(), priors.end());
    for (int64_t row = begin + (end - begin - 1) / step * step; row >= begin; row -= step) {
        AttendItem item{b, row, std::min(step, end - row), s.context_lens[b] - (end - row), 0, 0, -1};
        item.first_span = priors.empty() ? first_key(s, item.position) / kSpan : priors.size(), item.prior = prior;
        item.spans = spans_of(item) - item.first_span;
        plan.items.push_back(item);
    }
}

// An item that is more than half of a thread's share of the work becomes one for each of its spans.
void split(const AttendStep& s, int threads, AttendPlan& plan) {
    int64_t total = 0;
    const std::vector<AttendItem> whole(plan.items.begin() + plan.shared, plan.items.end());
    plan.items.resize(plan.shared);
    for (const auto& item : whole) total += item.rows * item.spans;
    for (AttendItem item : whole) {
        const int64_t records = item.rows * s.query_heads * item.spans;
        const bool large = 2 * threads * item.rows * item.spans > s.heads * total;
        if (threads == 1 || item.spans < 2 || !large || plan.records + records > kMostRecords) {
            plan.items.push_back(item);
            continue;
        }
        plan.merges.push_back({item.row, item.rows, item.position, item.first_span, item.spans, plan.records, item.prior});
        const int64_t end = item.first_span + item.spans;
        for (item.spans = 1; item.first_span < end; ++item.first_span) {
            item.partial = plan.records;
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
    std::vector<int64_t> few;
    std::vector<std::string> faults(s.sequences);
    for (int64_t b = 0; b < s.sequences; ++b) {
        const int64_t rows = s.starts[b + 1] - s.starts[b];
        if (rows == 0) continue;
        faults[b] = check_sequence(s, b);
        // Whoever has left a window behind reads it alone: it is short, and begins where no other's does.
        if (faults[b].empty() && rows <= kFewRows && s.context_lens[b] <= s.window) few.push_back(b);
        if (plan.fault.empty()) plan.fault = faults[b];
    }
    Priors priors(s.sequences);
    Sharing(s, plan, priors).add(few, 0);
    plan.shared = plan.items.size();
    for (int64_t b = 0; b < s.sequences; ++b) {
        const int64_t rows = s.starts[b + 1] - s.starts[b];
        if (!faults[b].empty()) {
            plan.items.push_back({b, s.starts[b], rows, 0, 0, 0, -1});
        } else if (rows > 0) {
            add_pieces(s, b, priors[b], plan);
        }
    }
    split(s, threads, plan);
    return plan;
}

Attend attend_call(const AttendStep& s, const AttendPlan& plan, const KvPool& pool, const float* q, float scale, float* out) {
    return {q, out, pool, s.tables, s.table_width, s.query_heads, s.window, scale, plan.items.data(), plan.merges.data(),
            plan.priors.data(), plan.shared_rows.data(), plan.shared, static_cast<int64_t>(plan.items.size()),
            static_cast<int64_t>(plan.merges.size()), plan.records};
}

}  // namespace tiny_llm
