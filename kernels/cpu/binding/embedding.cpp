#include "../embedding.h"

#include "bindings.h"
#include "matrix.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

mx::array look_up(const mx::array& tokens, const PackedMatrix& table) {
    const bool ok = tokens.ndim() == 1 && mx::issubdtype(tokens.dtype(), mx::integer);
    expect(ok, "embedding", "integer tokens [T]", tokens);
    const Spec rows{{tokens.shape(0), static_cast<int>(table.layout.columns)}, mx::float32};
    const int64_t count = tokens.shape(0);
    const auto run = [count, layout = table.layout](auto& in, auto& out) {
        embedding({get<int32_t>(in[0]), count, layout, get<float>(out[0])});
    };
    return call("embedding", {mx::astype(tokens, mx::int32), table.data}, {rows}, run)[0];
}

}  // namespace

void bind_embedding(nb::module_& m) {
    m.def("embedding", &look_up, nb::arg("tokens"), nb::arg("weight"),
          "Return the table's rows [T, E]; an id outside of it gives its nearest row.");
}

}  // namespace tiny_llm
