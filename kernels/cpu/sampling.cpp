#include "sampling.h"

#include "noise.h"
#include "ranking.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr float kLeastTemperature = 1e-30f;  // still a normal float, and as good as greedy
constexpr double kLeastTopP = 1e-30;

Cut filter(const Draw& draw, const Row& row) {
    const bool top_k = draw.top_k > 0 && draw.top_k < row.vocab, top_p = draw.top_p < 1;
    Cut cut{-INFINITY, -1};
    if (top_k || top_p) {
        fill_buckets(row);
        cut = cut_of(row, top_k ? draw.top_k : INT64_MAX, fmax(draw.top_p, kLeastTopP));
    }
    return draw.least_score > cut.score ? Cut{draw.least_score, INT32_MAX} : cut;
}

struct Winner {
    float value;
    uint32_t id;
};

// The kept token with the largest score + noise. Few are close enough to the best so far to need noise, and
// few of these to need it to the last bit, which a C library gives the same on every instruction set.
Winner winner_of(const Row& row, Cut cut, Key key, int64_t begin, int64_t end) {
    Winner best{-INFINITY, 0};
    for (int64_t i = begin; i < end; i += kWidth) {
        const vf scores = logits_at(row.scores, i, end);
        vi kept = keeps(cut, scores, i) & (scores + kMostNoise > best.value);
        if (!any(kept)) continue;
        const vf u = uniform(random_words(key, i, row.vocab));
        kept &= scores + gumbel_nearly(u) > best.value - kNoiseError;
        if (!any(kept)) continue;
        for (int lane = 0; lane < kWidth; ++lane) {
            if (!kept[lane]) continue;
            const float value = scores[lane] + gumbel(u[lane]);
            if (value > best.value) best = {value, (uint32_t)(i + lane)};
        }
    }
    return best;
}

uint32_t draw_token(const float* logits, int64_t vocab, const Draw& draw) {
    const Largest largest = largest_of(logits, vocab);
    // Where the largest is no finite number there is no distribution to draw from.
    if (!(draw.temperature > 0) || !(fabsf(largest.value) < INFINITY)) return place_of(logits, vocab, largest);

    const Row row = row_of(logits, vocab, largest.value, fmaxf(draw.temperature, kLeastTemperature));
    const Cut cut = filter(draw, row);
    const Key key = key_of(draw.seed, draw.position);
    Winner* winners = (Winner*)scratch(3, row.chunks() * sizeof(Winner));
    for_chunks(vocab, [&](int64_t chunk, int64_t begin, int64_t end) {
        winners[chunk] = winner_of(row, cut, key, begin, end);
    });
    Winner best = winners[0];
    for (int64_t i = 1; i < row.chunks(); ++i)
        if (winners[i].value > best.value) best = winners[i];
    return best.id;
}

}  // namespace

void sampling(const Sampling& a) {
    parallel_for(a.rows, 1 + 8192 / a.vocab, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            a.tokens[row] = draw_token(a.logits + row * a.vocab, a.vocab, a.draws[row]);
    });
}

}  // namespace tiny_llm::TINY_ISA
