#include "../rope.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <array>
#include <optional>
#include <string>

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

using Norm = std::optional<mx::array>;

void check(const char* op, const mx::array& x, const mx::array& positions, const mx::array& inv_freq) {
    const bool ok = x.ndim() == 3 && x.dtype() == mx::float32 && x.shape(2) % 2 == 0;
    expect(ok, op, "x float32 [T, H, D] with even D", x);
    expect(positions.shape() == mx::Shape{x.shape(0)} && mx::issubdtype(positions.dtype(), mx::integer), op,
           [&] { return "integer positions [" + std::to_string(x.shape(0)) + "]"; }, positions);
    expect(inv_freq.shape() == mx::Shape{x.shape(2) / 2} && inv_freq.dtype() == mx::float32, op,
           [&] { return "inv_freq float32 [" + std::to_string(x.shape(2) / 2) + "]"; }, inv_freq);
}

void check_norm(const mx::array& x, const Norm& norm) {
    if (norm)
        expect(norm->shape() == mx::Shape{x.shape(2)} && norm->dtype() == mx::float32, "rope_qk",
               [&] { return "a norm float32 [" + std::to_string(x.shape(2)) + "]"; }, *norm);
}

// int32, which they are in a model: no other operation then.
mx::array integers(const mx::array& positions) {
    return positions.dtype() == mx::int32 ? positions : mx::astype(positions, mx::int32);
}

Rope arguments(const mx::array& x, float eps) {
    Rope args{};
    args.tokens = x.shape(0), args.dim = x.shape(2), args.eps = eps;
    args.parts[0].heads = x.shape(1);
    return args;
}

mx::array turn(const mx::array& x, const mx::array& positions, const mx::array& inv_freq) {
    check("rope", x, positions, inv_freq);
    return call("rope", {integers(positions), inv_freq, x}, {{x.shape(), mx::float32}},
                [args = arguments(x, 0)](auto& in, auto& out) mutable {
        args.positions = get<int32_t>(in[0]), args.inv_freq = get<float>(in[1]);
        args.parts[0].x = get<float>(in[2]), args.parts[0].out = get<float>(out[0]);
        rope(args);
    })[0];
}

std::pair<mx::array, mx::array> turn_both(const mx::array& q, const mx::array& k, const mx::array& positions,
                                          const mx::array& inv_freq, const Norm& q_norm, const Norm& k_norm,
                                          float eps) {
    check("rope_qk", q, positions, inv_freq);
    check("rope_qk", k, positions, inv_freq);
    check_norm(q, q_norm), check_norm(k, k_norm);
    std::vector<mx::array> inputs{integers(positions), inv_freq, q, k};
    for (const Norm* norm : {&q_norm, &k_norm})
        if (*norm) inputs.push_back(**norm);
    Rope args = arguments(q, eps);
    args.parts[1].heads = k.shape(1);
    const int norm_at[] = {q_norm ? 4 : 0, k_norm ? 4 + q_norm.has_value() : 0};
    auto results = call("rope_qk", std::move(inputs), {{q.shape(), mx::float32}, {k.shape(), mx::float32}},
                        [args, norm_at = std::to_array(norm_at)](auto& in, auto& out) mutable {
        args.positions = get<int32_t>(in[0]), args.inv_freq = get<float>(in[1]);
        for (int i = 0; i < 2; ++i) {
            args.parts[i].x = get<float>(in[2 + i]), args.parts[i].out = get<float>(out[i]);
            args.parts[i].norm = norm_at[i] ? get<float>(in[norm_at[i]]) : nullptr;
        }
        rope(args);
    });
    return {results[0], results[1]};
}

}  // namespace

void bind_rope(nb::module_& m) {
    m.def("rope", &turn, nb::arg("x"), nb::arg("positions"), nb::arg("inv_freq"));
    m.def("rope_qk", &turn_both, nb::arg("q"), nb::arg("k"), nb::arg("positions"), nb::arg("inv_freq"),
          nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"),
          "Turn q and k in one go, each head normed before it if there is a norm.");
}

}  // namespace tiny_llm
