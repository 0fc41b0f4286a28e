#include "../attention.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstdio>
#include <utility>
#include <vector>

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
    if (pool.dtype() == mx::int8) return KvType::i8;
    expect(pool.dtype() == mx::float16, "attend", "a pool of float32, bfloat16, float16 or int8", pool);
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

// The two arrays of an int8 pool that say what its integers are multiples of.
void check_scales(const std::vector<mx::array>& pool) {
    const mx::array& keys = pool[0];
    for (const mx::array& scales : {pool[2], pool[3]})
        expect(scales.shape() == mx::Shape{keys.shape(0), keys.shape(1), keys.shape(3)} && scales.dtype() == mx::float16,
               "attend", "scales float16 [N, K, S] of int8 keys and values", scales);
}

using Result = std::pair<mx::array, std::vector<mx::array>>;

Result attend_pages(const mx::array& q, const mx::array& k, const mx::array& v, const std::vector<mx::array>& arrays,
                    const mx::array& slots, const mx::array& tables, const mx::array& starts, const mx::array& lens, float scale, int window) {
    if (window < 0) throw std::invalid_argument("[attend] expected a window of at least 1, or 0 for none");
    const bool scaled = arrays.size() == 4;
    if (arrays.size() != 2 && !scaled) throw std::invalid_argument("[attend] expected a pool of 2 or 4 arrays");
    const mx::array& keys = arrays[0];
    check_rows(q, k, v, keys, arrays[1]);
    check_integers(k, slots, tables, starts, lens);
    if (scaled) check_scales(arrays);
    const KvType type = type_of(keys);
    expect(scaled == (type == KvType::i8), "attend", "scales beside int8 keys, and beside no others", keys);
    const KvPool pool{nullptr, nullptr, type, keys.shape(0), keys.shape(1), keys.shape(2), keys.shape(3), nullptr, nullptr};
    const AttendStep shape{nullptr, nullptr, nullptr, nullptr, k.shape(0), tables.shape(0), tables.shape(1), q.shape(0),
                           pool.blocks, pool.block_size, pool.heads, q.shape(1), window ? window : INT64_MAX};
    std::vector<mx::array> inputs = {q, k, v, slots, tables, starts, lens};
    std::vector<Spec> outputs = {{q.shape(), mx::float32}};
    for (const mx::array& array : arrays) {
        outputs.push_back({array.shape(), array.dtype(), static_cast<int>(inputs.size())});
        inputs.push_back(array);
    }
    auto results = call("attend", inputs, outputs, [=](auto& in, auto& out) {
        AttendStep step = shape;
        step.slots = get<int32_t>(in[3]), step.tables = get<int32_t>(in[4]);
        step.starts = get<int32_t>(in[5]), step.context_lens = get<int32_t>(in[6]);
        KvPool to = pool;
        to.keys = out[1], to.values = out[2];
        if (scaled) to.key_scales = out[3], to.value_scales = out[4];
        const AttendPlan plan = plan_attend(step, num_threads());
        if (!plan.fault.empty()) std::fprintf(stderr, "[attend] %s; its rows are NaN\n", plan.fault.c_str());
        kv_write({get<float>(in[1]), get<float>(in[2]), step.slots, step.writes, to});
        attend(attend_call(step, plan, to, get<float>(in[0]), scale, get<float>(out[0])));
    });
    return {results[0], {results.begin() + 1, results.end()}};
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attend", &attend_pages, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("pool"),
          nb::arg("slots"), nb::arg("block_tables"), nb::arg("starts"), nb::arg("context_lens"), nb::arg("scale"),
          nb::arg("window") = 0,
          "Write k, v to their slots of the pool, in place, and attend: (out, pool).");
}

}  // namespace tiny_llm
