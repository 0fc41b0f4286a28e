#include "../softmax.h"

#include <string>

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

mx::array rows_of(const mx::array& x) {
    const bool ok = x.dtype() == mx::float32 && x.ndim() > 0 && x.shape(-1) > 0;
    expect(ok, "softmax", "x float32 [..., N] of at least one value a row", x);
    const int64_t width = x.shape(-1), rows = static_cast<int64_t>(x.size()) / width;
    return call("softmax", {x}, {{x.shape(), mx::float32}}, [rows, width](auto& in, auto& out) {
        softmax({get<float>(in[0]), get<float>(out[0]), rows, width});
    })[0];
}

}  // namespace

void bind_softmax(nb::module_& m) { m.def("softmax", &rows_of, nb::arg("x"), "Softmax over the last axis."); }

}  // namespace tiny_llm
