// Which tokens top-k and top-p keep, without sorting a vocabulary. Kernel files only.
//
// Tokens rank by score, best first, the lower id first among equals. A first pass counts them, and adds up
// their weights exp(score), in buckets of scores; a cut falls into one bucket, and only its tokens are sorted.
// Scores are at most 0, and buckets a fixed share of an octave wide: neither temperature nor outliers matter.
#pragma once

#include "vocabulary.h"

namespace tiny_llm::TINY_ISA {

// The last token that is kept.
struct Cut {
    float score;
    int32_t id;
};

struct Bucket {
    double mass;
    int64_t count;
};
// 64 an octave from -2^-6 to -2^10; the first holds what is nearer to 0, the last the rest.
constexpr int kBuckets = 1024, kShift = 17, kFirst = (127 - 6) << 6;
constexpr int kBins = kBuckets + 1;  // the last bin, which nobody reads, takes -inf

// Which of kWidth tokens, from id i on, are kept.
static inline vi keeps(Cut cut, vf scores, int64_t i) {
    vi lanes;
    for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane;
    return (scores > cut.score) | ((scores == cut.score) & (lanes + (int32_t)i <= cut.id));
}

struct Token {
    uint32_t distance;  // the bits of -score, which order as integers do
    int32_t id;
};

struct Row {
    const float* scores;
    int64_t vocab;
    Bucket* buckets;  // [chunks + 1][kBins]: of each chunk, then of them all

    int64_t chunks() const { return chunks_of(vocab); }
    const Bucket* total() const { return buckets + chunks() * kBins; }
};

static inline vi bins_of(vf scores) {
    const vi distance = (vi)scores & 0x7fffffff;
    vi bin = (distance >> kShift) - kFirst;
    bin &= ~(bin < 0);
    const vi beyond = bin >= kBuckets;
    bin = (beyond & (kBuckets - 1)) | (~beyond & bin);
    return bin - (distance == 0x7f800000);  // a comparison's truth is -1
}

static inline float weight_of(float score) { return exp(splat(score))[0]; }
static inline float score_of(Token token) {
    const uint32_t bits = token.distance | 0x80000000;
    float score;
    memcpy(&score, &bits, 4);
    return score;
}

static inline void fill_buckets(const Row& row) {
    for_chunks(row.vocab, [=](int64_t chunk, int64_t begin, int64_t end) {
        Bucket* buckets = row.buckets + chunk * kBins;
        memset(buckets, 0, kBins * sizeof(Bucket));
        for (int64_t i = begin; i < end; i += kWidth) {
            const vf scores = logits_at(row.scores, i, end), weights = exp(scores);
            const vi bins = bins_of(scores);
            for (int lane = 0; lane < kWidth; ++lane) {
                Bucket& bucket = buckets[bins[lane]];
                bucket.mass += weights[lane];
                bucket.count += 1;
            }
        }
    });
    Bucket* total = row.buckets + row.chunks() * kBins;
    memset(total, 0, kBins * sizeof(Bucket));
    for (int64_t chunk = 0; chunk < row.chunks(); ++chunk)
        for (int bin = 0; bin < kBuckets; ++bin) {
            total[bin].mass += row.buckets[chunk * kBins + bin].mass;
            total[bin].count += row.buckets[chunk * kBins + bin].count;
        }
}

// Sorts by distance, equals in the order that they have. 11 bits at a time; what all share costs no pass.
static inline Token* sort_tokens(Token* tokens, Token* spare, int64_t count) {
    for (int shift = 0; shift < 32; shift += 11) {
        int64_t places[2048] = {};
        for (int64_t i = 0; i < count; ++i) ++places[(tokens[i].distance >> shift) & 2047];
        if (count == 0 || places[(tokens[0].distance >> shift) & 2047] == count) continue;
        int64_t before = 0;
        for (int64_t& place : places) {
            const int64_t here = place;
            place = before;
            before += here;
        }
        for (int64_t i = 0; i < count; ++i) spare[places[(tokens[i].distance >> shift) & 2047]++] = tokens[i];
        Token* sorted = spare;
        spare = tokens;
        tokens = sorted;
    }
    return tokens;
}

// A row ready to be ranked: scores are (logit - largest) / temperature. In this thread's scratch.
static inline Row row_of(const float* logits, int64_t vocab, float largest, float temperature) {
    const size_t bins = (chunks_of(vocab) + 1) * kBins;
    Bucket* buckets = (Bucket*)scratch(1, bins * sizeof(Bucket) + vocab * sizeof(float));
    float* scores = (float*)(buckets + bins);
    for_chunks(vocab, [=](int64_t, int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + kWidth <= end; i += kWidth) store(scores + i, (load(logits + i) - largest) / temperature);
        for (; i < end; ++i) scores[i] = (logits[i] - largest) / temperature;
    });
    return {scores, vocab, buckets};
}

// The tokens of one bucket, best first; in this thread's scratch.
static inline const Token* ranked(const Row& row, int bucket) {
    const int64_t count = row.total()[bucket].count, chunks = row.chunks();
    int64_t* starts = (int64_t*)scratch(2, chunks * sizeof(int64_t) + 2 * count * sizeof(Token));
    Token* tokens = (Token*)(starts + chunks);
    int64_t before = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        starts[chunk] = before;
        before += row.buckets[chunk * kBins + bucket].count;
    }
    for_chunks(row.vocab, [=](int64_t chunk, int64_t begin, int64_t end) {
        Token* next = tokens + starts[chunk];
        for (int64_t i = begin; i < end; i += kWidth) {
            const vf scores = logits_at(row.scores, i, end);
            const vi here = bins_of(scores) == bucket;
            if (!any(here)) continue;
            const vi distances = (vi)scores & 0x7fffffff;
            for (int lane = 0; lane < kWidth; ++lane)
                if (here[lane]) *next++ = {(uint32_t)distances[lane], (int32_t)(i + lane)};
        }
    });
    return sort_tokens(tokens, tokens + count, count);
}

// A place in the ranking: so many whole buckets, with so many tokens and so much mass.
struct Place {
    int bucket;
    int64_t count;
    double mass;
};

// The first bucket, before `end`, in which the count or the mass is reached; `end` if none.
static inline Place find(const Bucket* buckets, int end, int64_t count, double mass) {
    Place at{0, 0, 0};
    for (; at.bucket < end; ++at.bucket) {
        const Bucket& next = buckets[at.bucket];
        if (at.count + next.count >= count || at.mass + next.mass >= mass) break;
        at.count += next.count;
        at.mass += next.mass;
    }
    return at;
}

// The last token of the best `top_k`, and of the fewest of these whose share of their mass reaches `top_p`.
static inline Cut cut_of(const Row& row, int64_t top_k, double top_p) {
    const Place at_k = find(row.total(), kBuckets, top_k, INFINITY);
    const bool cuts = at_k.bucket < kBuckets;
    const Token* tokens = cuts ? ranked(row, at_k.bucket) : nullptr;
    int64_t most = cuts ? top_k - at_k.count : 0;
    double mass = at_k.mass;
    for (int64_t i = 0; i < most; ++i) mass += weight_of(score_of(tokens[i]));
    const double wanted = top_p < 1 ? top_p * mass : INFINITY;

    const Place at_p = find(row.total(), at_k.bucket, INT64_MAX, wanted);
    if (at_p.bucket < at_k.bucket) {
        tokens = ranked(row, at_p.bucket);
        most = row.total()[at_p.bucket].count;
    } else if (!cuts) {
        return {-INFINITY, -1};
    }
    int64_t kept = 0;
    for (double before = at_p.mass; kept < most && before < wanted; ++kept) before += weight_of(score_of(tokens[kept]));
    return {score_of(tokens[kept - 1]), tokens[kept - 1].id};
}

}  // namespace tiny_llm::TINY_ISA
