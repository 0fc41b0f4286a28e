#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>

#include "../attention_plan.h"
#include "../pool.h"
#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

float as_stored_alone(float x, KvType type) {
    if (type == KvType::bf16) {
        x = to_bf16(x);
    } else if (type == KvType::f16) {
        int exponent;  // of eleven bits' last: older compilers have no half type for every processor
        std::frexp(x, &exponent);
        const float unit = std::ldexp(1.f, std::max(exponent, -13) - 11);
        x = std::nearbyint(x / unit) * unit;
    }
    return x;
}

// Vectors of `dim` as a pool gives them back.
void as_stored(std::vector<float>& x, KvType type, int64_t dim) {
    for (size_t i = 0; i < x.size(); i += dim) {
        float most = 0;
        for (int64_t d = 0; d < dim; ++d) most = std::max(most, std::fabs(x[i + d]));
        const float scale = as_stored_alone(most / 127, KvType::f16);
        for (int64_t d = 0; d < dim; ++d)
            x[i + d] = type == KvType::i8 ? scale * std::clamp(std::nearbyint(x[i + d] / scale), -127.f, 127.f)
                                          : as_stored_alone(x[i + d], type);
    }
}

// Sequences with a pool of their own. Memory that nobody wrote is NaN, so that reading it shows.
struct Case {
    std::vector<int32_t> contexts, fresh;  // keys of each sequence, and how many of them are this step's
    int64_t heads, kv_heads, dim, block_size;
    KvType type = KvType::f32;
    std::vector<uint32_t> names = {0, 1, 2, 3, 4, 5, 6, 7};  // whose numbers each sequence has
    uint32_t shuffle = 0;                                    // another order of blocks
    int64_t window = INT64_MAX;                              // blocks that it leaves behind are nobody's: NaN

    int64_t rows() const { return std::accumulate(fresh.begin(), fresh.end(), int64_t{0}); }
    int64_t width() const { return (*std::max_element(contexts.begin(), contexts.end()) + block_size - 1) / block_size; }
    float scale() const { return 1 / std::sqrt(float(dim)); }
    int64_t first_seen(int64_t b) const { return std::max<int64_t>(0, contexts[b] - fresh[b] + 1 - std::min<int64_t>(window, 1 << 30)); }

    // Element i at position p of a sequence, the same in whatever batch.
    static float draw(uint32_t seed, int64_t p, int64_t i) {
        uint32_t x = seed * 0x9e3779b9u + uint32_t(p) * 0x85ebca6bu + uint32_t(i) * 0xc2b2ae35u;
        x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
        return float(int32_t(x)) * 4.6566e-10f * 2;
    }
};

struct Inputs {
    std::vector<float> q, k, v;  // k and v of whole contexts
};

std::vector<float> rows_of(const Case& c, uint32_t what, int64_t width, bool all) {
    std::vector<float> rows;
    for (size_t b = 0; b < c.contexts.size(); ++b)
        for (int64_t p = all ? 0 : c.contexts[b] - c.fresh[b]; p < c.contexts[b]; ++p)
            for (int64_t i = 0; i < width; ++i) rows.push_back(Case::draw(what + 10 * c.names[b], p, i));
    return rows;
}

Inputs inputs_of(const Case& c) {
    return {rows_of(c, 3, c.heads * c.dim, false), rows_of(c, 1, c.kv_heads * c.dim, true),
            rows_of(c, 2, c.kv_heads * c.dim, true)};
}

// A pool with a case's keys and values in it, and the step that attends to them.
struct Pool {
    const Case& c;
    const Inputs& in;
    int64_t width, blocks;
    std::vector<int32_t> tables, starts, contexts, slots;
    std::vector<char> keys, values, key_scales, value_scales;
    std::string fault = "";
    int64_t shared = 0;  // items over spans that sequences share

    Pool(const Case& c, const Inputs& in) : c(c), in(in), width(c.width()), blocks(c.contexts.size() * width + 1) {
        const int64_t B = c.contexts.size(), S = c.block_size;
        std::vector<int32_t> order(blocks);
        std::iota(order.begin(), order.end(), 0);
        if (c.shuffle) std::shuffle(order.begin(), order.end(), std::mt19937(c.shuffle));
        tables.assign(B * width, -7), starts = {0}, contexts = c.contexts;
        for (int64_t b = 0; b < B; ++b) {
            starts.push_back(starts.back() + c.fresh[b]);
            for (int64_t i = 0; i * S < c.contexts[b]; ++i) tables[b * width + i] = order[b * width + i];
            for (int64_t p = 0; p < c.contexts[b]; ++p)
                slots.push_back(p / S < c.first_seen(b) / S ? -1 : tables[b * width + p / S] * S + p % S);
            std::fill_n(tables.begin() + b * width, c.first_seen(b) / S, order.back());
        }
        const size_t tokens = blocks * c.kv_heads * S, item = c.type == KvType::f32 ? 4 : c.type == KvType::i8 ? 1 : 2;
        for (auto* array : {&keys, &values}) array->assign(tokens * c.dim * item, char(0xff));
        if (c.type == KvType::i8)
            for (auto* array : {&key_scales, &value_scales}) array->assign(tokens * 2, char(0xff));
    }

    std::vector<float> run() {
        const KvPool pool{keys.data(), values.data(), c.type, blocks, c.kv_heads, c.dim, c.block_size,
                          key_scales.data(), value_scales.data()};
        kv_write({in.k.data(), in.v.data(), slots.data(), int64_t(slots.size()), pool});
        std::vector<float> out(in.q.size(), -1);
        const AttendStep step{slots.data(), tables.data(), starts.data(), contexts.data(), int64_t(slots.size()),
                              int64_t(contexts.size()), width, c.rows(), blocks, c.block_size, c.kv_heads, c.heads, c.window};
        const AttendPlan plan = plan_attend(step, num_threads());
        fault = plan.fault, shared = plan.shared;
        attend(attend_call(step, plan, pool, in.q.data(), c.scale(), out.data()));
        return out;
    }
};

// A score to base 2, in float64; or, where products are of two bf16, as the kernel has it: a chain of fma.
double score_of(const Case& c, const float* q, const float* k, bool rounded) {
    constexpr float kLog2e = 1.44269504f;
    double exact = 0;
    float chain = 0;
    for (int64_t d = 0; d < c.dim; ++d) {
        exact += double(q[d]) * k[d];
        chain = std::fma(as_stored_alone(q[d] * (c.scale() * kLog2e), KvType::bf16), k[d], chain);
    }
    return rounded ? chain : exact * c.scale() / std::log(2.0);
}

// 2^(score - most), to the bit as simd.h's exp2_below has it before it is rounded to bf16.
double rounded_weight(float score, double most) {
    const float whole = std::nearbyint(score), x = score - whole;
    float p = 1.326469937339425e-3f;
    for (const float term : {9.67150367796421e-3f, 5.550733581185341e-2f, 2.4022242426872253e-1f, 6.931470036506653e-1f, 1.0f})
        p = std::fma(p, x, term);
    return as_stored_alone(float(std::ldexp(p, int(whole - most))), KvType::bf16);
}

// One row's attention over the last keys of its first `keys`, from a sequence's k and v.
void add_row(const Case& c, const float* q, const float* k, const float* v, int64_t keys, bool rounded, std::vector<double>& out) {
    const int64_t first = std::max<int64_t>(0, keys - std::min(c.window, keys));
    const int64_t stride = c.kv_heads * c.dim;
    std::vector<double> weights(keys), sums(c.dim);
    double most = -1e300, total = 0;
    for (int64_t s = first; s < keys; ++s) most = std::max(most, weights[s] = score_of(c, q, k + s * stride, rounded));
    for (int64_t s = first; s < keys; ++s) {
        weights[s] = rounded ? rounded_weight(float(weights[s]), std::ceil(most)) : std::exp2(weights[s] - most);
        total += weights[s];
        for (int64_t d = 0; d < c.dim; ++d) sums[d] += weights[s] * v[s * stride + d];
    }
    for (double sum : sums) out.push_back(sum / total);
}

// In float64; `rounded`: but for queries and weights, which AVX512-BF16 takes as bf16.
std::vector<double> expected(const Case& c, const Inputs& stored, bool rounded = false) {
    std::vector<double> out;
    const float *q = stored.q.data(), *k = stored.k.data(), *v = stored.v.data();
    for (size_t b = 0; b < c.contexts.size(); ++b) {
        for (int64_t p = c.contexts[b] - c.fresh[b]; p < c.contexts[b]; ++p)
            for (int64_t h = 0; h < c.heads; ++h, q += c.dim) {
                const int64_t at = h / (c.heads / c.kv_heads) * c.dim;
                add_row(c, q, k + at, v + at, p + 1, rounded, out);
            }
        k += c.contexts[b] * c.kv_heads * c.dim, v += c.contexts[b] * c.kv_heads * c.dim;
    }
    return out;
}

Inputs as_stored(const Case& c, Inputs in) {
    for (auto* stored : {&in.k, &in.v}) as_stored(*stored, c.type, c.dim);
    return in;
}

void check_case(const Case& c, const Inputs& in, const Inputs& stored) {
    const auto wanted = expected(c, stored);
    on_each_isa([&] {
        const bool rounded = std::string(isa_name(isa())) == "avx512bf16" && c.type == KvType::bf16;
        Pool pool(c, in);
        const auto got = pool.run();
        double error = off(got.data(), wanted.data(), wanted.size());
        CHECK(pool.fault.empty(), "%s", pool.fault.c_str());
        if (rounded) {
            CHECK(error < 8e-3, "off by %g", error);
            error = off(got.data(), expected(c, stored, true).data(), wanted.size());
        }
        CHECK(error < 2e-6, "off by %g: contexts %d.. fresh %d.. heads %d/%d dim %d S %d type %d", error, c.contexts[0],
              c.fresh[0], int(c.heads), int(c.kv_heads), int(c.dim), int(c.block_size), int(c.type));
    });
}

void check_case(const Case& c) {
    const Inputs in = inputs_of(c);
    check_case(c, in, as_stored(c, in));
}

const KvType kTypes[] = {KvType::f32, KvType::bf16, KvType::f16, KvType::i8};

}  // namespace

TEST(attention_matches_float64) {
    for (int64_t dim : {1, 8, 12, 33, 64, 80, 128, 256})
        for (auto [heads, kv_heads] : {std::pair{1, 1}, {14, 2}, {3, 3}, {20, 1}})
            check_case({{40, 1, 290}, {3, 1, 23}, heads, kv_heads, dim, dim % 3 ? 16 : 32, kTypes[(dim + heads) % 4]});
    for (KvType type : kTypes)
        for (int64_t size : {16, 32, 64}) {
            check_case({{1, 15, 16, 17, 255, 256, 257, 600}, {1, 1, 1, 1, 1, 1, 1, 1}, 7, 1, 64, size, type});
            check_case({{255, 256, 257, 600}, {20, 256, 2, 20}, 2, 2, 32, size, type});
            check_case({{100}, {100}, 80, 1, 16, size, type});
        }
}

// One row at a time against all at once, alone against in company, blocks in another order and of another
// size, more threads: the same bits.
TEST(attention_bits_are_a_rows_own) {
    const int threads = num_threads();
    for (auto [type, dim, heads] : {std::tuple{KvType::f32, 24, 2}, {KvType::bf16, 64, 14}, {KvType::f16, 40, 6}, {KvType::i8, 64, 14}}) {
        const Case whole{{600}, {600}, heads, 2, dim, 32, type, {5}};
        const Inputs whole_in = inputs_of(whole);
        const size_t row = heads * dim;
        on_each_isa([&, type = type, dim = dim, heads = heads] {
            set_num_threads(1);
            const auto want = Pool(whole, whole_in).run();
            for (auto [context, fresh] : {std::pair{600, 1}, {600, 2}, {600, 37}, {600, 344}, {512, 512}, {513, 1}, {257, 3}, {40, 7}}) {
                Case c{{300, context, 1, 90}, {4, fresh, 1, 9}, heads, 2, dim, 16, type, {1, 5, 2, 3}};
                const Inputs in = inputs_of(c);
                for (auto [size, many] : {std::pair{16, 1}, {32, 2}, {64, 3}, {16, 64}}) {
                    if (fresh > 100 && many % 2 == (fresh == 512)) continue;  // long: two of the four each
                    if (kFewerCases && (fresh > 100 && type != KvType::f32)) continue;
                    c.block_size = size, c.shuffle = many;
                    set_num_threads(many);
                    const auto got = Pool(c, in).run();
                    CHECK(!std::memcmp(&got[4 * row], &want[(context - fresh) * row], fresh * row * 4),
                          "context %d, %d rows, S %d, %d threads, dim %d, type %d", context, fresh, int(size), many,
                          int(dim), int(type));
                }
            }
        });
    }
    set_num_threads(threads);
}

// A row sees its window: against float64, at every place of a window's edge in spans, blocks and vectors.
TEST(attention_within_a_window) {
    for (Case c : {Case{{900, 40, 257, 701}, {1, 40, 3, 1}, 14, 2, 64, 16, {}, {0, 1, 2, 3}, 3},
                   {{900, 40, 257, 701}, {1, 40, 3, 1}, 2, 1, 40, 16, {}, {0, 1, 2, 3}, 3},
                   {{900, 40, 257, 701}, {1, 40, 3, 1}, 4, 4, 33, 16, {}, {0, 1, 2, 3}, 3},
                   {{600, 300}, {300, 37}, 7, 1, 32, 32, {}, {4, 5}, 5}}) {
        const Inputs in = inputs_of(c);
        for (KvType type : kTypes) {
            c.type = type;
            const Inputs stored = as_stored(c, in);
            for (int64_t window : {1, 7, 100, 256, 257, 700}) {
                if (kFewerCases && (window + int(type)) % 2) continue;
                c.window = window;
                check_case(c, in, stored);
            }
        }
    }
}

// The same bits for a row with others of its sequence and alone, in one thread and in many, where windows end anywhere.
TEST(attention_bits_within_a_window) {
    const int threads = num_threads();
    for (auto [type, dim, heads] : {std::tuple{KvType::f32, 24, 2}, {KvType::bf16, 64, 4}, {KvType::i8, 64, 4}}) {
        std::vector<std::pair<Case, Inputs>> cases;
        for (auto [context, fresh] : {std::pair{900, 1}, {900, 2}, {900, 37}, {800, 44}, {513, 1}, {257, 3}, {40, 7}}) {
            const Case c{{700, context, 1, 90}, {4, fresh, 1, 9}, heads, 2, dim, 16, type, {1, 5, 2, 3}};
            cases.emplace_back(c, inputs_of(c));
        }
        for (int64_t window : {5, 250, 300}) {
            Case whole{{900}, {900}, heads, 2, dim, 32, type, {5}};
            whole.window = window;
            const Inputs whole_in = inputs_of(whole);
            const size_t row = heads * dim;
            on_each_isa([&, type = type] {
                set_num_threads(1);
                const auto want = Pool(whole, whole_in).run();
                for (auto& [c, in] : cases)
                    for (auto [size, many] : {std::pair{16, 1}, {64, 3}, {16, 64}}) {
                        c.block_size = size, c.shuffle = many, c.window = window;
                        const int context = c.contexts[1], fresh = c.fresh[1];
                        set_num_threads(many);
                        const auto got = Pool(c, in).run();
                        CHECK(!std::memcmp(&got[4 * row], &want[(context - fresh) * row], fresh * row * 4),
                              "window %d, context %d, %d rows, S %d, %d threads, type %d", int(window), context, fresh,
                              int(size), many, int(type));
                    }
            });
        }
    }
    set_num_threads(threads);
}

// Tables that begin with the same blocks, in groups inside groups: what is read once for many gives the bits that
// each alone has.
TEST(attention_of_shared_blocks_changes_no_bit) {
    const int threads = num_threads();
    std::mt19937 random(3);
    const auto upto = [&](int most) { return int(random() % (most + 1)); };
    for (int trial = kFewerCases ? 25 : 0; trial < 40; ++trial) {
        const KvType type = kTypes[trial % 4];
        const int64_t size = trial % 3 ? 16 : 64, dim = trial % 5 ? 64 : 24, kv_heads = 1 + trial % 2;
        Case c{{}, {}, kv_heads * (1 + upto(6)), kv_heads, dim, size, type, {}};
        const int sequences = trial == 39 ? 90 : 2 + upto(6);
        for (int b = 0; b < sequences; ++b) {
            c.fresh.push_back(b % 4 == 3 ? 1 + upto(40) : 1 + upto(3) * (b % 3 == 2));
            c.contexts.push_back(c.fresh.back() + 200 + upto(trial == 39 ? 400 : 900));
            c.names.push_back(5);
        }
        if (trial % 5 == 4) c.window = 900;  // some have left it behind, and read alone
        const Inputs in = inputs_of(c);
        std::vector<std::pair<int, int>> likes;  // the sequence whose table each begins with, and for how many blocks
        for (int b = 0; b < sequences; ++b)
            likes.emplace_back(b ? upto(b - 1) : 0, upto((c.contexts[b] - c.fresh[b]) / int(size)));
        on_each_isa([&] {
            set_num_threads(1);
            const auto want = Pool(c, in).run();
            set_num_threads(1 + trial % 3 * 7);
            Pool pool(c, in);
            bool any = false;
            for (int b = 0; b < sequences; ++b) {
                const auto [like, blocks] = likes[b];
                const int there = std::min<int>(blocks, (c.contexts[like] - c.fresh[like]) / size);
                const int left = std::max(c.first_seen(like), c.first_seen(b)) / size;
                if (there > left) std::copy_n(&pool.tables[like * pool.width + left], there - left, &pool.tables[b * pool.width + left]);
                any |= like != b && std::max(c.contexts[like], c.contexts[b]) <= c.window && there * size >= kSpan && c.fresh[b] <= 16 && c.fresh[like] <= 16;
            }
            const auto got = pool.run();
            CHECK(pool.fault.empty(), "%s", pool.fault.c_str());
            CHECK(!any || pool.shared > 0, "trial %d: nothing is read together", trial);
            CHECK(!std::memcmp(got.data(), want.data(), got.size() * 4), "trial %d: %d sequences, S %d, dim %d, type %d",
                  trial, sequences, int(size), int(dim), int(type));
        });
    }
    set_num_threads(threads);
}

// Numbers that cannot be: that sequence's rows are NaN, the others as ever, and nothing is read or written
// outside of the pool.
TEST(attention_survives_wrong_integers) {
    const Case c{{50, 20, 300}, {3, 1, 7}, 4, 2, 16, 16, KvType::f32};
    const Inputs in = inputs_of(c);
    const int64_t row = c.heads * c.dim;
    struct Wrong {
        std::vector<int32_t> Pool::*list;
        int64_t at;
        int32_t value;
        int64_t first, last;  // rows that become NaN
    };
    const int32_t most = 0x7fffffff;
    on_each_isa([&] {
        const auto right = Pool(c, in).run();
        for (const Wrong& wrong : {Wrong{&Pool::contexts, 1, 0, 3, 4}, {&Pool::contexts, 1, -5, 3, 4},
                                   {&Pool::contexts, 1, most, 3, 4}, {&Pool::contexts, 2, 6, 4, 11},
                                   {&Pool::tables, 0, -1, 0, 3}, {&Pool::tables, 3, 1000000, 0, 3},
                                   {&Pool::tables, 3, most, 0, 3}, {&Pool::starts, 1, 5, 0, 11},
                                   {&Pool::starts, 1, -1, 0, 11}, {&Pool::starts, 3, most, 0, 11},
                                   {&Pool::starts, 0, 1, 0, 11}, {&Pool::slots, 7, -2, 0, 11},
                                   {&Pool::slots, 7, most, 0, 11}}) {
            Pool pool(c, in);
            (pool.*wrong.list)[wrong.at] = wrong.value;
            const auto got = pool.run();
            CHECK(!pool.fault.empty(), "value %d at %d", wrong.value, int(wrong.at));
            for (int64_t i = 0; i < int64_t(got.size()); ++i) {
                const bool hit = i / row >= wrong.first && i / row < wrong.last;
                CHECK(hit ? std::isnan(got[i]) : got[i] == right[i], "%s: row %d", pool.fault.c_str(), int(i / row));
            }
        }
    });
}

// A slot of -1 is a row that is not kept; no rows, no sequences and no writes are fine too.
TEST(attention_of_nothing) {
    on_each_isa([] {
        const Case c{{20}, {2}, 4, 2, 16, 16, KvType::f32};
        const Inputs in = inputs_of(c);
        Pool pool(c, in);
        const auto out = pool.run();
        pool.slots.assign(pool.slots.size(), -1);
        CHECK(pool.run() == out && pool.fault.empty(), "rows at slot -1 were written");
        const Case none{{17}, {0}, 4, 2, 16, 16, KvType::f32};
        const Inputs only_keys = inputs_of(none);
        CHECK(Pool(none, only_keys).run().empty());
        const AttendPlan plan = plan_attend({nullptr, nullptr, pool.starts.data(), nullptr, 0, 0, 0, 0, 0, 16, 2, 4}, 2);
        CHECK(plan.items.empty() && plan.fault.empty(), "%s", plan.fault.c_str());
    });
}
