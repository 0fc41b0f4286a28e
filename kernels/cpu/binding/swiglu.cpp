#include "../swiglu.h"

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

mx::array gate(const mx::array& gate, const mx::array& up) {
    expect(gate.dtype() == mx::float32, "swiglu", "gate float32 [..., F]", gate);
    const bool alike = up.dtype() == mx::float32 && up.shape() == gate.shape();
    expect(alike, "swiglu", "up like gate, " + describe(gate), up);
    const auto count = static_cast<int64_t>(gate.size());
    return call("swiglu", {gate, up}, {{gate.shape(), mx::float32}}, [count](auto& in, auto& out) {
        swiglu({get<float>(in[0]), get<float>(in[1]), get<float>(out[0]), count});
    })[0];
}

}  // namespace

void bind_swiglu(nb::module_& m) {
    m.def("swiglu", &gate, nb::arg("gate"), nb::arg("up"), "Return silu(gate) * up.");
}

}  // namespace tiny_llm
