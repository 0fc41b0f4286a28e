#include "experts.h"

#include "dense_matmul.h"
#include "pool.h"
#include "quantized_matmul.h"
#include "simd.h"
#include "softmax.h"

namespace tiny_llm::TINY_ISA {
namespace {

// Slots of the thread that calls; those of products are others.
constexpr int kRoutesSlot = 4, kOrderSlot = 5, kScoresSlot = 6;

struct Routes {
    float* weights;   // [T, k]
    int32_t* chosen;  // [T, k], the best first
};

// Of equals the first. What is taken has no score any more.
int best_of(const float* scores, const uint8_t* taken, int count) {
    int best = -1;
    for (int e = 0; e < count; ++e)
        if (!taken[e] && (best < 0 || scores[e] > scores[best])) best = e;
    return best;
}

void route_row(const Experts& a, const float* shares, float* weights, int32_t* chosen) {
    const int count = (int)a.count;
    float* scores = (float*)scratch(kScoresSlot, count * (sizeof(float) + 1));
    uint8_t* taken = (uint8_t*)(scores + count);
    memset(taken, 0, count);
    for (int e = 0; e < count; ++e) scores[e] = a.correction ? shares[e] + a.correction[e] : shares[e];
    float total = 0;
    for (int i = 0; i < a.per_row; ++i) {
        const int best = chosen[i] = best_of(scores, taken, count);
        taken[best] = 1;
        weights[i] = shares[best];
        total += shares[best];
    }
    if (!a.normalised) return;
    total = total < 1e-12f ? 1e-12f : total;
    for (int i = 0; i < a.per_row; ++i) weights[i] /= total;
}

Routes route(const Experts& a) {
    const int64_t count = a.count, pairs = a.rows * a.per_row;
    float* shares = (float*)scratch(kRoutesSlot, a.rows * count * sizeof(float) + pairs * 8);
    const Routes routes{shares + a.rows * count, (int32_t*)(shares + a.rows * count + pairs)};
    softmax({a.logits, shares, a.rows, count});
    parallel_for(a.rows, 1 + 8192 / (count * a.per_row), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            route_row(a, shares + t * count, routes.weights + t * a.per_row, routes.chosen + t * a.per_row);
    });
    return routes;
}

// Pairs of a row and an expert, sorted by expert.
struct Order {
    int32_t* source;  // [T * k], whose row each is
    int32_t* place;   // [T, k], where each row's pairs are
    Part* parts;
    int64_t part_count;
};

// An expert's rows, in parts whose x stays near while its tiles pass by.
void add_parts(Order& order, int64_t first, int64_t rows, int64_t expert, int64_t most) {
    const int64_t count = (rows + most - 1) / most;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t from = rows * i / count;
        order.parts[order.part_count++] = {first + from, rows * (i + 1) / count - from, expert};
    }
}

Order sort(const Experts& a, const int32_t* chosen, int64_t width) {
    const int64_t count = a.count, pairs = a.rows * a.per_row, most = 1 + 256 * 1024 / width;
    const size_t ends_bytes = (count + 1) * sizeof(int64_t), parts = count + pairs / most;
    int64_t* ends = (int64_t*)scratch(kOrderSlot, ends_bytes + parts * sizeof(Part) + 2 * pairs * sizeof(int32_t));
    Part* first = (Part*)(ends + count + 1);
    Order order{(int32_t*)(first + parts), (int32_t*)(first + parts) + pairs, first, 0};
    memset(ends, 0, ends_bytes);
    for (int64_t i = 0; i < pairs; ++i) ++ends[chosen[i] + 1];
    for (int64_t e = 0; e < count; ++e) {
        add_parts(order, ends[e], ends[e + 1], e, most);
        ends[e + 1] += ends[e];
    }
    for (int64_t t = 0, i = 0; t < a.rows; ++t)
        for (int r = 0; r < a.per_row; ++r, ++i) {
            const int64_t at = ends[chosen[i]]++;
            order.source[at] = (int32_t)t, order.place[i] = (int32_t)at;
        }
    return order;
}

void product(const Experts& a, const Order& order, const float* x, const int32_t* source, const Matrix* m, bool gated,
             float* out) {
    const float* biases[2] = {};
    const Linear linear{x, a.rows * a.per_row, gated ? 2 : 1, m, biases, &out, gated, order.parts, order.part_count, source};
    is_quantized(m->kind) ? TINY_ISA::quantized_matmul(linear) : TINY_ISA::dense_matmul(linear);
}

void weigh_row(const Experts& a, const float* weights, const int32_t* place, float* out) {
    const int64_t width = a.down.rows;
    for (int64_t i = 0; i < width; i += kWidth) {
        const int64_t left = width - i;
        vf sum = {};
        for (int r = 0; r < a.per_row; ++r) {
            const float* from = a.outputs + place[r] * width + i;
            sum = fma(splat(weights[r]), left < kWidth ? load_part(from, left, 0) : load(from), sum);
        }
        left < kWidth ? store_part(out + i, sum, left) : store(out + i, sum);
    }
}

}  // namespace

void experts(const Experts& a) {
    if (a.rows == 0) return;
    const Routes routes = route(a);
    const Order order = sort(a, routes.chosen, a.gates ? a.gate_up[0].columns : a.down.rows);
    if (a.gates) product(a, order, a.x, order.source, a.gate_up, true, a.hidden);
    if (!a.weighs) return;
    product(a, order, a.hidden, nullptr, &a.down, false, a.outputs);
    parallel_for(a.rows, 1 + 16384 / (a.down.rows * a.per_row), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            weigh_row(a, routes.weights + t * a.per_row, order.place + t * a.per_row, a.out + t * a.down.rows);
    });
}

}  // namespace tiny_llm::TINY_ISA
