#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "../attention_plan.h"
#include "../pool.h"
#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

float as_stored(float x, KvType type) {
    if (type == KvType::bf16) {
        uint32_t u;
        std::memcpy(&u, &x, 4);
        u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000;
        std::memcpy(&x, &u, 4);
    } else if (type == KvType::f16) {
        x = float(_Float16(x));
    }
    return x;
}

// Sequences with a pool of their own. Memory that nobody wrote is NaN, so that reading it shows.
struct Case {
    std::vector<int32_t> contexts, fresh;  // keys of each sequence, and how many of them are this step's
    int64_t heads, kv_heads, dim, block_size;
    KvType type = KvType::f32;
    uint32_t shuffle = 0;  // another order of blocks

    int64_t rows() const { return std::accumulate(fresh.begin(), fresh.end(), int64_t{0}); }
    int64_t width() const { return (*std::max_element(contexts.begin(), contexts.end()) + block_size - 1) / block_size; }
    // Element d of head h at position p of sequence b, the same in whatever batch.
    static float draw(uint32_t seed, int64_t p, int64_t i) {
        uint32_t x = seed * 0x9e3779b9u + uint32_t(p) * 0x85ebca6bu + uint32_t(i) * 0xc2b2ae35u;
        x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
        return float(int32_t(x)) * 4.6566e-10f * 2;
    }
};

struct Result {
    std::vector<float> out;
    std::string fault;
};

std::vector<float> rows_of(const Case& c, uint32_t what, int64_t width, const std::vector<uint32_t>& names, bool all) {
    std::vector<float> rows;
    for (size_t b = 0; b < c.contexts.size(); ++b)
        for (int64_t p = all ? 0 : c.contexts[b] - c.fresh[b]; p < c.contexts[b]; ++p)
            for (int64_t i = 0; i < width; ++i) rows.push_back(Case::draw(what + 10 * names[b], p, i));
    return rows;
}

Result run(const Case& c, const std::vector<uint32_t>& names) {
    const int64_t B = c.contexts.size(), S = c.block_size, M = c.width(), N = B * M + 1, K = c.kv_heads;
    std::vector<int32_t> order(N), tables(B * M, -7), starts{0}, slots;
    std::iota(order.begin(), order.end(), 0);
    if (c.shuffle) std::shuffle(order.begin(), order.end(), std::mt19937(c.shuffle));
    for (int64_t b = 0; b < B; ++b) {
        starts.push_back(starts.back() + c.fresh[b]);
        for (int64_t i = 0; i * S < c.contexts[b]; ++i) tables[b * M + i] = order[b * M + i];
        for (int64_t p = 0; p < c.contexts[b]; ++p) slots.push_back(tables[b * M + p / S] * S + p % S);
    }
    const size_t bytes = N * K * c.dim * S * 4;
    std::vector<char> keys(bytes, char(0xff)), values(bytes, char(0xff));
    const KvPool pool{keys.data(), values.data(), c.type, N, K, c.dim, S};
    const auto k = rows_of(c, 1, K * c.dim, names, true), v = rows_of(c, 2, K * c.dim, names, true);
    const auto q = rows_of(c, 3, c.heads * c.dim, names, false);
    kv_write({k.data(), v.data(), slots.data(), int64_t(slots.size()), pool});
    Result result{std::vector<float>(c.rows() * c.heads * c.dim, -1), ""};
    const AttendPlan plan = plan_attend({slots.data(), tables.data(), starts.data(), c.contexts.data(),
                                         int64_t(slots.size()), B, M, c.rows(), N, S, K, c.heads}, num_threads());
    result.fault = plan.fault;
    attend({q.data(), result.out.data(), pool, tables.data(), M, c.heads, 0.3f, plan.items.data(), plan.merges.data(),
            int64_t(plan.items.size()), int64_t(plan.merges.size()), plan.records});
    return result;
}

std::vector<uint32_t> names_of(const Case& c) {
    std::vector<uint32_t> names(c.contexts.size());
    std::iota(names.begin(), names.end(), 0);
    return names;
}

std::vector<double> expected(const Case& c) {
    std::vector<double> out;
    for (size_t b = 0; b < c.contexts.size(); ++b)
        for (int64_t p = c.contexts[b] - c.fresh[b]; p < c.contexts[b]; ++p)
            for (int64_t h = 0; h < c.heads; ++h) {
                const int64_t g = h / (c.heads / c.kv_heads) * c.dim;
                std::vector<double> weights(p + 1), sums(c.dim);
                double most = -1e300, total = 0;
                for (int64_t s = 0; s <= p; ++s) {
                    for (int64_t d = 0; d < c.dim; ++d)
                        weights[s] += double(Case::draw(3 + 10 * b, p, h * c.dim + d)) *
                                      as_stored(Case::draw(1 + 10 * b, s, g + d), c.type);
                    most = std::max(most, weights[s] *= 0.3f);
                }
                for (int64_t s = 0; s <= p; ++s) {
                    total += weights[s] = std::exp(weights[s] - most);
                    for (int64_t d = 0; d < c.dim; ++d)
                        sums[d] += weights[s] * as_stored(Case::draw(2 + 10 * b, s, g + d), c.type);
                }
                for (double sum : sums) out.push_back(sum / total);
            }
    return out;
}

void check_case(const Case& c) {
    const Result got = run(c, names_of(c));
    const auto wanted = expected(c);
    CHECK(got.fault.empty(), "%s", got.fault.c_str());
    CHECK(off(got.out.data(), wanted.data(), wanted.size()) < 2e-5, "off by %g: contexts %d.. fresh %d.. heads %d/%d dim %d S %d type %d",
          off(got.out.data(), wanted.data(), wanted.size()), c.contexts[0], c.fresh[0], int(c.heads), int(c.kv_heads),
          int(c.dim), int(c.block_size), int(c.type));
}

const KvType kTypes[] = {KvType::f32, KvType::bf16, KvType::f16};

}  // namespace

TEST(attention_matches_float64) {
    on_each_isa([] {
        for (int64_t dim : {1, 8, 12, 33, 64, 80, 128, 256})
            for (auto [heads, kv_heads] : {std::pair{1, 1}, {14, 2}, {3, 3}, {20, 1}})
                check_case({{70, 1, 300}, {3, 1, 33}, heads, kv_heads, dim, dim % 3 ? 16 : 32, kTypes[dim % 3]});
        for (KvType type : kTypes)
            for (int64_t size : {16, 32, 64}) {
                check_case({{1, 15, 16, 17, 255, 256, 257, 600}, {1, 1, 1, 1, 1, 1, 1, 1}, 14, 2, 64, size, type});
                check_case({{255, 256, 257, 600}, {255, 256, 2, 20}, 4, 4, 32, size, type});
                check_case({{150}, {150}, 80, 1, 16, size, type});
            }
    });
}

// One row at a time against all at once, alone against in company, blocks in another order and of another
// size, more threads: the same bits.
TEST(attention_bits_are_a_rows_own) {
    const int threads = num_threads();
    on_each_isa([] {
        for (KvType type : kTypes)
            for (int64_t dim : {24, 64}) {
                const Case whole{{700}, {700}, 14, 2, dim, 32, type};
                set_num_threads(1);
                const auto want = run(whole, {5}).out;
                const size_t row = 14 * dim;
                for (auto [context, fresh] : {std::pair{700, 1}, {700, 2}, {700, 37}, {700, 444}, {512, 512}, {513, 1}, {257, 3}, {40, 7}})
                    for (int64_t size : {16, 32, 64})
                        for (int many : {1, 2, 3, 64}) {
                            set_num_threads(many);
                            const Case c{{300, context, 1, 90}, {4, fresh, 1, 90}, 14, 2, dim, size, type, uint32_t(many)};
                            const auto got = run(c, {1, 5, 2, 3}).out;
                            CHECK(!std::memcmp(&got[4 * row], &want[(context - fresh) * row], fresh * row * 4),
                                  "context %d, %d rows, S %d, %d threads, dim %d, type %d", context, fresh, int(size), many,
                                  int(dim), int(type));
                        }
            }
    });
    set_num_threads(threads);
}
