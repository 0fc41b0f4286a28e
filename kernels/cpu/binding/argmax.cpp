#include "../argmax.h"

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

mx::array places_of(const mx::array& x) {
    const bool ok = x.dtype() == mx::float32 && x.ndim() > 0 && x.shape(-1) > 0;
    expect(ok, "argmax", "x float32 [..., N] of at least one value a row", x);
    const int64_t width = x.shape(-1), rows = static_cast<int64_t>(x.size()) / width;
    mx::Shape shape = x.shape();
    shape.pop_back();
    return call("argmax", {x}, {{shape, mx::uint32}}, [rows, width](auto& in, auto& out) {
        argmax({get<float>(in[0]), get<uint32_t>(out[0]), rows, width});
    })[0];
}

}  // namespace

void bind_argmax(nb::module_& m) {
    m.def("argmax", &places_of, nb::arg("x"), "The place of the largest value of the last axis, the lowest among equals.");
}

}  // namespace tiny_llm
