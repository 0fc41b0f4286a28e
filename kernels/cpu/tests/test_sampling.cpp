// Against plain definitions: the whole vocabulary sorted, weights in float64, noise word by word.
#include "../sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../argmax.h"
#include "../logprobs.h"
#include "../pool.h"
#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const std::vector<int64_t> kVocabularies = {1, 2, 3, 16, 17, 255, 1000, 16383, 16385, 40001};

struct Pair {
    uint32_t a, b;
};

Pair plain_threefry(Pair key, Pair x) {
    const int turns[] = {13, 15, 26, 6, 17, 29, 16, 24};
    const uint32_t keys[] = {key.a, key.b, key.a ^ key.b ^ 0x1BD11BDA};
    x = {x.a + key.a, x.b + key.b};
    for (uint32_t round = 0; round < 20; ++round) {
        x.a += x.b;
        const int turn = turns[round % 8];
        x.b = (x.b << turn | x.b >> (32 - turn)) ^ x.a;
        if (round % 4 == 3) {
            const uint32_t block = round / 4 + 1;
            x = {x.a + keys[block % 3], x.b + keys[(block + 1) % 3] + block};
        }
    }
    return x;
}

// All words of a row's noise, by pairs.
std::vector<uint32_t> plain_words(uint64_t seed, uint64_t position, uint32_t count) {
    const Pair whole{uint32_t(seed >> 32), uint32_t(seed)};
    const Pair key{plain_threefry(whole, {0, 2}).a ^ uint32_t(position >> 32),
                   plain_threefry(whole, {1, 3}).a ^ uint32_t(position)};
    std::vector<uint32_t> words(count);
    const uint32_t half = count / 2, step = half + count % 2;
    for (uint32_t i = 0; i < half; ++i) {
        const Pair both = plain_threefry(key, {i, i + step});
        words[i] = both.a;
        words[i + step] = both.b;
    }
    if (count % 2) words[half] = plain_threefry(key, {half, 0}).a;
    return words;
}

float plain_noise(uint32_t word) {
    const float u = std::fmin(float(word) / 4294967296.0f, 1 - 0x1p-24f);
    return std::fmax(-logf(-logf(u)), -4.0f);
}

size_t plain_argmax(const float* x, int64_t width) {
    size_t best = 0;
    for (int64_t i = 0; i < width; ++i) {
        if (std::isnan(x[i])) return i;
        if (x[i] > x[best]) best = i;
    }
    return best;
}

uint32_t plain_draw(const float* x, int64_t vocab, const Draw& draw, const std::vector<uint32_t>& words) {
    const size_t top = plain_argmax(x, vocab);
    if (draw.temperature == 0 || !std::isfinite(x[top])) return top;
    std::vector<float> scores(vocab);
    for (int64_t i = 0; i < vocab; ++i) scores[i] = (x[i] - x[top]) / draw.temperature;
    std::vector<uint32_t> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return scores[a] > scores[b]; });
    if (draw.top_k > 0) order.resize(std::min(vocab, draw.top_k));
    double total = 0, before = 0;
    for (uint32_t i : order) total += std::exp(double(scores[i]));
    float most = -kInfinity;
    uint32_t winner = 0;
    for (uint32_t i : order) {
        if (draw.top_p < 1 && before >= draw.top_p * total) break;
        before += std::exp(double(scores[i]));
        const float value = scores[i] + plain_noise(words[i]);
        if (scores[i] < draw.least_score || value == -kInfinity) continue;
        if (value > most || (value == most && i < winner)) most = value, winner = i;
    }
    return winner;
}

std::vector<uint32_t> draws_of(const std::vector<float>& logits, const std::vector<Draw>& draws, int64_t vocab) {
    std::vector<uint32_t> tokens(draws.size());
    sampling({logits.data(), draws.data(), tokens.data(), int64_t(draws.size()), vocab});
    return tokens;
}

std::vector<Draw> many_kinds(int64_t vocab) {
    std::vector<Draw> draws;
    uint64_t seed = 0x123456789;
    for (float temperature : {0.0f, 1.0f, 0.3f, 1e-30f, 20.0f})
        for (int64_t top_k : {int64_t(0), int64_t(1), int64_t(7), vocab / 2, vocab + 1})
            for (double top_p : {1.0, 0.9, 0.4, 1e-40})
                for (float least : {-kInfinity, -3.0f}) draws.push_back({temperature, least, top_p, top_k, ++seed, seed % 5});
    return draws;
}

// Ordinary logits, and ones that are hard to rank: few values, an outlier, masked tokens, all the same.
std::vector<float> logits_like(int kind, int64_t vocab) {
    auto x = random_floats(vocab, kind + 1, -6, 6);
    for (int64_t i = 0; i < vocab; ++i) {
        if (kind == 1) x[i] = std::round(x[i]);
        if (kind == 2 && i % 3 == 0) x[i] = -kInfinity;
        if (kind == 3) x[i] = i == vocab / 2 ? -1e30f : x[i] * 1e-3f;
        if (kind == 4) x[i] = -2;
    }
    return x;
}

}  // namespace

TEST(draws_match_the_definition) {
    for (int64_t vocab : kVocabularies) {
        std::vector<Draw> draws;
        const auto kinds = many_kinds(vocab);
        for (size_t r = 0; r < kinds.size(); r += (vocab > 10000 ? 3 : 1) * (kFewerCases ? 3 : 1)) draws.push_back(kinds[r]);
        std::vector<std::vector<uint32_t>> words;
        for (const Draw& d : draws) words.push_back(plain_words(d.seed, d.position, vocab));
        for (int kind = 0; kind < 5; ++kind) {
            const auto row = logits_like(kind, vocab);
            std::vector<float> logits;
            std::vector<uint32_t> expected;
            for (size_t r = 0; r < draws.size(); ++r) {
                logits.insert(logits.end(), row.begin(), row.end());
                expected.push_back(plain_draw(row.data(), vocab, draws[r], words[r]));
            }
            on_each_isa([&] {
                const auto tokens = draws_of(logits, draws, vocab);
                for (size_t r = 0; r < draws.size(); ++r) {
                    const Draw& d = draws[r];
                    CHECK(tokens[r] == expected[r], "vocab %d kind %d T %g k %d p %g least %g: %u, expected %u", int(vocab),
                          kind, d.temperature, int(d.top_k), d.top_p, d.least_score, tokens[r], expected[r]);
                }
            });
        }
    }
}

// Alone, its chunks are shared out; among others, it is one thread's. Nothing of that may show.
TEST(a_draw_does_not_depend_on_threads_or_other_rows) {
    const int threads = num_threads();
    const int64_t vocab = 151936;
    const std::vector<Draw> draws = {{1, -kInfinity, 1, 0, 1, 2},      {0.7f, -kInfinity, 0.95, 0, 3, 4},
                                     {1, -kInfinity, 0.9, 50, 5, 6},   {1.5f, -4, 0.999, 20000, 7, 8},
                                     {0, -kInfinity, 1, 0, 0, 0}};
    const auto logits = random_floats(vocab * draws.size(), 9, -8, 8);
    on_each_isa([&] {
        set_num_threads(1);
        const auto expected = draws_of(logits, draws, vocab);
        for (int n : {1, 2, 3}) {
            set_num_threads(n);
            CHECK(draws_of(logits, draws, vocab) == expected, "%d threads", n);
            for (size_t r = 0; r < draws.size(); ++r) {
                const std::vector<float> row(logits.begin() + r * vocab, logits.begin() + (r + 1) * vocab);
                CHECK(draws_of(row, {draws[r]}, vocab)[0] == expected[r], "row %d alone, %d threads", int(r), n);
            }
        }
    });
    set_num_threads(threads);
}

TEST(rows_that_are_not_finite_are_drawn_as_if_greedy) {
    on_each_isa([] {
        for (int64_t vocab : {3, 100, 20000})
            for (float odd : {float(NAN), kInfinity, -kInfinity}) {
                std::vector<float> row(vocab, odd == -kInfinity ? odd : 1.0f);
                row[vocab / 2] = row[vocab - 1] = odd;
                const uint32_t expected = plain_argmax(row.data(), vocab);
                for (const Draw& draw : many_kinds(vocab))
                    CHECK(draws_of(row, {draw}, vocab)[0] == expected, "vocab %d with %g", int(vocab), odd);
            }
    });
}

TEST(argmax_is_the_first_of_the_largest_or_the_first_nan) {
    on_each_isa([] {
        for (int64_t width : kVocabularies)
            for (int kind = 0; kind < 6; ++kind) {
                auto x = logits_like(kind, 4 * width);
                if (kind == 5) x[width / 3] = x[2 * width] = x[2 * width + width / 2] = NAN;
                std::vector<uint32_t> places(4);
                argmax({x.data(), places.data(), 4, width});
                for (int64_t r = 0; r < 4; ++r) {
                    const size_t expected = plain_argmax(x.data() + r * width, width);
                    CHECK(places[r] == expected, "width %d kind %d row %d: %u", int(width), kind, int(r), places[r]);
                }
            }
    });
    argmax({nullptr, nullptr, 0, 5});
    sampling({nullptr, nullptr, nullptr, 0, 5});
}

TEST(logprobs_match_float64) {
    on_each_isa([] {
        for (int64_t vocab : kVocabularies)
            for (int kind = 0; kind < 5; ++kind)
                for (int64_t count : {int64_t(0), int64_t(1), std::min<int64_t>(vocab, 20), std::min<int64_t>(vocab, 3000)}) {
                    const auto row = logits_like(kind, vocab);
                    const float top = row[plain_argmax(row.data(), vocab)];
                    if (top == -kInfinity) continue;
                    double total = 0;
                    for (float x : row) total += std::exp(double(x) - top);
                    std::vector<uint32_t> order(vocab), tokens = {uint32_t(vocab / 2), uint32_t(vocab)};
                    std::iota(order.begin(), order.end(), 0);
                    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return row[a] > row[b]; });
                    std::vector<float> two(row), chosen(2), values(2 * count);
                    two.insert(two.end(), row.begin(), row.end());
                    std::vector<uint32_t> ids(2 * count);
                    logprobs({two.data(), tokens.data(), chosen.data(), ids.data(), values.data(), 2, vocab, count});
                    std::vector<double> expected;
                    for (int r = 0; r < 2; ++r)
                        for (int64_t i = 0; i < count; ++i) expected.push_back(double(row[order[i]]) - top - std::log(total));
                    for (int64_t i = 0; i < 2 * count; ++i) {
                        const bool same = ids[i] == order[i % count] || row[ids[i]] - top == row[order[i % count]] - top;
                        const double d = expected[i] == -kInfinity ? values[i] != -kInfinity : values[i] - expected[i];
                        CHECK(same && std::fabs(d) <= 1e-6 * (1 + std::fabs(expected[i])), "vocab %d kind %d place %d: %u %g",
                              int(vocab), kind, int(i), ids[i], values[i]);
                    }
                    const double own = double(row[vocab / 2]) - top - std::log(total);
                    CHECK(own == -kInfinity ? chosen[0] == own : std::fabs(chosen[0] - own) <= 1e-6 * (1 + std::fabs(own)));
                    CHECK(std::isnan(chosen[1]), "a token outside of the vocabulary");
                }
    });
}
