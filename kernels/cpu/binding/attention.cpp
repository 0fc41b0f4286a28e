#include "../attention.h"

#include <nanobind/stl/tuple.h>

#include <cstdio>
#include <tuple>

#include "../attention_plan.h"
#include "../pool.h"
#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

KvType type_of(const mx::array& pool) {
    if (pool.dtype() == mx::float32) return KvType::f32;
    if (pool.dtype() == mx::bfloat16) return KvType::bf16;
    expect(pool.dtype() == mx::float16, "attend", "a pool of float32, bfloat16 or float16", pool);
    return KvType::f16;
}

void check_rows(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& keys, const mx::array& values) {
    expect(q.ndim() == 3 && q.dtype() == mx::float32, "attend", "q float32 [T, H, D]", q);
    expect(k.ndim() == 3 && k.dtype() == mx::float32 && k.shape(2) == q.shape(2) && k.shape(1) > 0 &&
               q.shape(1) % k.shape(1) == 0, "attend", "k float32 [T, K, D] with K that divides H", k);
    expect(v.shape() == k.shape() && v.dtype() == k.dtype(), "attend", "v like k", v);
    expect(keys.ndim() == 4 && keys.shape(1) == k.shape(1) && keys.shape(2) == k.shape(2), "attend", "keys [N, K, D, S]", keys);
    const int size = keys.shape(3);
    expect(size >= 16 && 64 % size == 0, "attend", "blocks of 16, 32 or 64 tokens", keys);
    expect(values.shape() == mx::Shape{keys.shape(0), keys.shape(1), size, keys.shape(2)} && values.dtype() == keys.dtype(),
           "attend", "values [N, K, S, D] like keys", values);
    expect(q.shape(2) <= kMostHeadDim, "attend", "a head dim of at most " + std::to_string(kMostHeadDim), q);
}

void check_integers(const mx::array& k, const mx::array& slots, const mx::array& tables, const mx::array& starts,
                    const mx::array& lens) {
    expect(slots.dtype() == mx::int32 && slots.shape() == mx::Shape{k.shape(0)}, "attend", "slots int32 [T]", slots);
    expect(tables.dtype() == mx::int32 && tables.ndim() == 2, "attend", "block_tables int32 [B, W]", tables);
    const int sequences = tables.shape(0);
    expect(starts.dtype() == mx::int32 && starts.shape() == mx::Shape{sequences + 1}, "attend", "starts int32 [B + 1]", starts);
    expect(lens.dtype() == mx::int32 && lens.shape() == mx::Shape{sequences}, "attend", "context_lens int32 [B]", lens);
}

using Result = std::tuple<mx::array, mx::array, mx::array>;

Result attend_pages(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& keys, const mx::array& values,
                    const mx::array& slots, const mx::array& tables, const mx::array& starts, const mx::array& lens, float scale) {
    check_rows(q, k, v, keys, values);
    check_integers(k, slots, tables, starts, lens);
    const KvPool pool{nullptr, nullptr, type_of(keys), keys.shape(0), keys.shape(1), keys.shape(2), keys.shape(3)};
    const AttendStep shape{nullptr, nullptr, nullptr, nullptr, k.shape(0), tables.shape(0), tables.shape(1), q.shape(0),
                           pool.blocks, pool.block_size, pool.heads, q.shape(1)};
    auto results = call("attend", {q, k, v, keys, values, slots, tables, starts, lens},
                        {{q.shape(), mx::float32}, {keys.shape(), keys.dtype(), 3}, {values.shape(), values.dtype(), 4}},
                        [=](auto& in, auto& out) {
        AttendStep step = shape;
        step.slots = get<int32_t>(in[5]), step.tables = get<int32_t>(in[6]);
        step.starts = get<int32_t>(in[7]), step.context_lens = get<int32_t>(in[8]);
        KvPool to = pool;
        to.keys = out[1], to.values = out[2];
        const AttendPlan plan = plan_attend(step, num_threads());
        if (!plan.fault.empty()) std::fprintf(stderr, "[attend] %s; its rows are NaN\n", plan.fault.c_str());
        kv_write({get<float>(in[1]), get<float>(in[2]), step.slots, step.writes, to});
        attend({get<float>(in[0]), get<float>(out[0]), to, step.tables, step.table_width, step.query_heads, scale,
                plan.items.data(), plan.merges.data(), static_cast<int64_t>(plan.items.size()),
                static_cast<int64_t>(plan.merges.size()), plan.records});
    });
    return {results[0], results[1], results[2]};
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attend", &attend_pages, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("keys"), nb::arg("values"),
          nb::arg("slots"), nb::arg("block_tables"), nb::arg("starts"), nb::arg("context_lens"), nb::arg("scale"),
          "Write k, v to their slots of the pool, in place, and attend: (out, keys, values).");
}

}  // namespace tiny_llm
