#include "../rms_norm.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <optional>

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

void check(const mx::array& x, const mx::array& weight) {
    expect(x.ndim() >= 1 && x.dtype() == mx::float32, "rms_norm", "x float32 [..., E]", x);
    expect(weight.shape() == mx::Shape{x.shape(-1)} && weight.dtype() == mx::float32, "rms_norm",
           [&] { return "weight float32 [" + std::to_string(x.shape(-1)) + "]"; }, weight);
}

RmsNorm rows_of(const mx::array& x, float eps) {
    RmsNorm args{};
    args.width = x.shape(-1);
    args.rows = args.width ? static_cast<int64_t>(x.size()) / args.width : 0;
    args.eps = eps;
    return args;
}

mx::array norm(const mx::array& x, const mx::array& weight, float eps) {
    check(x, weight);
    return call("rms_norm", {x, weight}, {{x.shape(), x.dtype()}}, [args = rows_of(x, eps)](auto& in, auto& out) mutable {
        args.x = get<float>(in[0]), args.weight = get<float>(in[1]), args.out = get<float>(out[0]);
        rms_norm(args);
    })[0];
}

std::pair<mx::array, mx::array> add_norm(const mx::array& x, const mx::array& residual, const mx::array& weight,
                                         float eps) {
    check(x, weight);
    expect(residual.shape() == x.shape() && residual.dtype() == x.dtype(), "rms_norm", "a residual like x", residual);
    auto results = call("rms_norm", {x, residual, weight}, {{x.shape(), x.dtype()}, {x.shape(), x.dtype()}},
                        [args = rows_of(x, eps)](auto& in, auto& out) mutable {
        args.x = get<float>(in[0]), args.residual = get<float>(in[1]), args.weight = get<float>(in[2]);
        args.sum = get<float>(out[0]), args.out = get<float>(out[1]);
        rms_norm(args);
    });
    return {results[0], results[1]};
}

}  // namespace

void bind_rms_norm(nb::module_& m) {
    m.def("rms_norm", &norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"));
    m.def("add_rms_norm", &add_norm, nb::arg("x"), nb::arg("residual"), nb::arg("weight"), nb::arg("eps"),
          "Return (x + residual, its norm).");
}

}  // namespace tiny_llm
