#include "../experts.h"

#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "matrix.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

const char* kOp = "experts";

void check(const mx::array& x, const mx::array& logits, const std::optional<mx::array>& correction, int per_row,
           const Matrix& gate, const Matrix& up, const Matrix& down) {
    const bool alike = gate.rows == up.rows && gate.columns == up.columns && gate.rows == down.columns &&
                       gate.columns == down.rows && gate.count == up.count && gate.count == down.count;
    if (!alike) throw std::invalid_argument("[experts] expected gate and up [N, F, E] and down [N, E, F] of the same sizes");
    // The kernel reads x once for gate and up.
    if (gate.kind != up.kind && !(is_quantized(gate.kind) && is_quantized(up.kind)))
        throw std::invalid_argument("[experts] expected gate and up both dense of one kind, or both quantized");
    if (gate.group_size != up.group_size || gate.exact != up.exact)
        throw std::invalid_argument("[experts] expected gate and up of one group size");
    if (per_row < 1 || per_row > gate.count)
        throw std::invalid_argument("[experts] expected from 1 to " + std::to_string(gate.count) + " experts a row, got " +
                                    std::to_string(per_row));
    expect(x.ndim() == 2 && x.dtype() == mx::float32 && x.shape(1) == gate.columns, kOp,
           [&] { return "x float32 [T, " + std::to_string(gate.columns) + "]"; }, x);
    const auto ofAll = [&](const mx::array& a) { return a.dtype() == mx::float32 && a.shape(-1) == gate.count; };
    expect(logits.ndim() == 2 && ofAll(logits) && logits.shape(0) == x.shape(0), kOp,
           [&] { return "logits float32 [T, " + std::to_string(gate.count) + "]"; }, logits);
    if (correction)
        expect(correction->ndim() == 1 && ofAll(*correction), kOp,
               [&] { return "a correction float32 [" + std::to_string(gate.count) + "]"; }, *correction);
}

mx::array mixed(const mx::array& x, const mx::array& logits, const std::optional<mx::array>& correction, int per_row,
                bool normalised, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down) {
    check(x, logits, correction, per_row, gate.layout, up.layout, down.layout);
    std::vector<mx::array> inputs{x, logits, gate.data, up.data, down.data};
    if (correction) inputs.push_back(*correction);
    Experts a{};
    a.rows = x.shape(0), a.per_row = per_row, a.normalised = normalised;
    a.gate_up[0] = gate.layout, a.gate_up[1] = up.layout, a.down = down.layout;
    return call(kOp, std::move(inputs), {{x.shape(), mx::float32}}, [a](auto& in, auto& out) {
        const int64_t pairs = a.rows * a.per_row;
        // Not zeroed, and not kept: a long step's would be as large as its weights.
        const std::unique_ptr<float[]> room(new float[pairs * (a.down.columns + a.down.rows)]);
        Experts all = a;
        all.x = get<float>(in[0]), all.logits = get<float>(in[1]);
        all.correction = in.size() > 5 ? get<float>(in[5]) : nullptr;
        all.hidden = room.get(), all.outputs = room.get() + pairs * a.down.columns;
        all.out = get<float>(out[0]);
        experts(all);
    })[0];
}

}  // namespace

void bind_experts(nb::module_& m) {
    m.def("experts", &mixed, nb::arg("x"), nb::arg("logits"), nb::arg("correction").none(), nb::arg("per_row"),
          nb::arg("normalised"), nb::arg("gate"), nb::arg("up"), nb::arg("down"));
}

}  // namespace tiny_llm
