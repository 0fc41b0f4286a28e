#include "logprobs.h"

#include "ranking.h"

namespace tiny_llm::TINY_ISA {
namespace {

float log_total(const Row& row) {
    double total = 0;
    for (int bin = 0; bin < kBuckets; ++bin) total += row.total()[bin].mass;
    return (float)::log(total);
}

// The kept tokens, best first: at most `most`, in this thread's scratch.
const Token* best_of(const Row& row, Cut cut, int64_t most, int64_t* found) {
    Token* tokens = (Token*)scratch(3, 2 * most * sizeof(Token));
    int64_t count = 0;
    for (int64_t i = 0; i < row.vocab; i += kWidth) {
        const vf scores = logits_at(row.scores, i, row.vocab);
        const vi kept = keeps(cut, scores, i);
        if (!any(kept)) continue;
        for (int lane = 0; lane < kWidth; ++lane)
            if (kept[lane]) tokens[count++] = {(uint32_t)((vi)scores & 0x7fffffff)[lane], (int32_t)(i + lane)};
    }
    *found = count;
    return sort_tokens(tokens, tokens + most, count);
}

// Of tokens that cannot come, the lowest ids.
void fill_up(const Row& row, int64_t from, int64_t count, uint32_t* ids, float* values) {
    for (int64_t i = 0; from < count && i < row.vocab; ++i)
        if (row.scores[i] == -INFINITY) {
            ids[from] = (uint32_t)i;
            values[from++] = -INFINITY;
        }
}

void no_numbers(float* chosen, uint32_t* ids, float* values, int64_t count) {
    *chosen = NAN;
    for (int64_t i = 0; i < count; ++i) {
        ids[i] = (uint32_t)i;
        values[i] = NAN;
    }
}

void logprobs_row(const float* logits, uint32_t token, int64_t vocab, int64_t count, float* chosen, uint32_t* ids,
                  float* values) {
    const float largest = largest_of(logits, vocab).value;
    if (!(fabsf(largest) < INFINITY)) return no_numbers(chosen, ids, values, count);
    const Row row = row_of(logits, vocab, largest, 1);
    fill_buckets(row);
    const float total = log_total(row);
    *chosen = token < vocab ? row.scores[token] - total : NAN;
    if (count == 0) return;
    int64_t found = 0;
    const Cut cut = cut_of(row, count, 1);
    const Token* best = best_of(row, cut, count, &found);
    for (int64_t i = 0; i < found; ++i) {
        ids[i] = (uint32_t)best[i].id;
        values[i] = score_of(best[i]) - total;
    }
    fill_up(row, found, count, ids, values);
}

}  // namespace

void logprobs(const Logprobs& a) {
    parallel_for(a.rows, 1 + 8192 / a.vocab, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t at = row * a.count;
            logprobs_row(a.logits + row * a.vocab, a.tokens[row], a.vocab, a.count, a.chosen + row, a.ids + at,
                         a.values + at);
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
