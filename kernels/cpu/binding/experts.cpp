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

using Correction = std::optional<mx::array>;

std::string text(int64_t n) { return std::to_string(n); }

void check_pair(const mx::array& x, const Matrix& gate, const Matrix& up) {
    // The kernel reads x once for gate and up.
    if (gate.kind != up.kind && !(is_quantized(gate.kind) && is_quantized(up.kind)))
        throw std::invalid_argument("[experts] expected gate and up both dense of one kind, or both quantized");
    if (gate.group_size != up.group_size || gate.exact != up.exact)
        throw std::invalid_argument("[experts] expected gate and up of one group size");
    if (gate.rows != up.rows || gate.columns != up.columns || gate.count != up.count)
        throw std::invalid_argument("[experts] expected gate and up [N, F, E] of the same sizes");
    expect(x.ndim() == 2 && x.dtype() == mx::float32 && x.shape(1) == gate.columns, kOp,
           [&] { return "x float32 [T, " + text(gate.columns) + "]"; }, x);
}

void check_router(const mx::array& logits, const Correction& correction, int per_row, int64_t rows, int64_t count) {
    if (per_row < 1 || per_row > count)
        throw std::invalid_argument("[experts] expected from 1 to " + text(count) + " experts a row, got " + text(per_row));
    const auto ofAll = [&](const mx::array& a) { return a.dtype() == mx::float32 && a.shape(-1) == count; };
    expect(logits.ndim() == 2 && ofAll(logits) && logits.shape(0) == rows, kOp,
           [&] { return "logits float32 [T, " + text(count) + "]"; }, logits);
    if (correction)
        expect(correction->ndim() == 1 && ofAll(*correction), kOp,
               [&] { return "a correction float32 [" + text(count) + "]"; }, *correction);
}

// Inputs are x, or `hidden` where the first half is made already; logits; a correction if there is one.
mx::array run(Experts a, std::vector<mx::array> inputs, const Correction& correction, mx::Shape shape) {
    if (correction) inputs.insert(inputs.begin() + 2, *correction);
    const bool corrected = correction.has_value();
    return call(kOp, std::move(inputs), {{std::move(shape), mx::float32}}, [a, corrected](auto& in, auto& out) {
        Experts all = a;
        const int64_t pairs = a.rows * a.per_row, hidden = a.gates && a.weighs ? a.down.columns : 0;
        // Not zeroed, and not kept: a long step's would be as large as its weights.
        const std::unique_ptr<float[]> room(new float[a.weighs ? pairs * (hidden + a.down.rows) : 0]);
        const float* given = get<float>(in[0]);
        float* result = get<float>(out[0]);
        all.x = given, all.logits = get<float>(in[1]);
        all.correction = corrected ? get<float>(in[2]) : nullptr;
        all.hidden = !a.weighs ? result : a.gates ? room.get() : const_cast<float*>(given);
        all.outputs = room.get() + pairs * hidden, all.out = result;
        experts(all);
    })[0];
}

mx::array mixed(const mx::array& x, const mx::array& logits, const Correction& correction, int per_row,
                bool normalised, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down) {
    const Matrix &g = gate.layout, &d = down.layout;
    if (g.rows != d.columns || g.columns != d.rows || g.count != d.count)
        throw std::invalid_argument("[experts] expected gate and up [N, F, E] and down [N, E, F] of the same sizes");
    check_pair(x, g, up.layout);
    check_router(logits, correction, per_row, x.shape(0), g.count);
    Experts a{};
    a.rows = x.shape(0), a.per_row = per_row, a.normalised = normalised, a.count = g.count;
    a.gates = a.weighs = true;
    a.gate_up[0] = g, a.gate_up[1] = up.layout, a.down = d;
    return run(a, {x, logits, gate.data, up.data, down.data}, correction, x.shape());
}

mx::array first_half(const mx::array& x, const mx::array& logits, const Correction& correction, int per_row,
                     bool normalised, const PackedMatrix& gate, const PackedMatrix& up) {
    check_pair(x, gate.layout, up.layout);
    check_router(logits, correction, per_row, x.shape(0), gate.layout.count);
    Experts a{};
    a.rows = x.shape(0), a.per_row = per_row, a.normalised = normalised, a.count = gate.layout.count;
    a.gates = true;
    a.gate_up[0] = gate.layout, a.gate_up[1] = up.layout;
    return run(a, {x, logits, gate.data, up.data}, correction, {x.shape(0) * per_row, (int)gate.layout.rows});
}

mx::array second_half(const mx::array& hidden, const mx::array& logits, const Correction& correction, int per_row,
                      bool normalised, const PackedMatrix& down) {
    const Matrix& d = down.layout;
    const int64_t rows = logits.ndim() == 2 ? logits.shape(0) : 0;
    check_router(logits, correction, per_row, rows, d.count);
    expect(hidden.ndim() == 2 && hidden.dtype() == mx::float32 && hidden.shape(1) == d.columns && hidden.shape(0) == rows * per_row,
           kOp, [&] { return "hidden float32 [" + text(rows * per_row) + ", " + text(d.columns) + "]"; }, hidden);
    Experts a{};
    a.rows = rows, a.per_row = per_row, a.normalised = normalised, a.count = d.count;
    a.weighs = true, a.down = d;
    return run(a, {hidden, logits, down.data}, correction, {(int)rows, (int)d.rows});
}

}  // namespace

void bind_experts(nb::module_& m) {
    m.def("experts", &mixed, nb::arg("x"), nb::arg("logits"), nb::arg("correction").none(), nb::arg("per_row"),
          nb::arg("normalised"), nb::arg("gate"), nb::arg("up"), nb::arg("down"));
    m.def("experts_gated", &first_half, nb::arg("x"), nb::arg("logits"), nb::arg("correction").none(),
          nb::arg("per_row"), nb::arg("normalised"), nb::arg("gate"), nb::arg("up"));
    m.def("experts_down", &second_half, nb::arg("hidden"), nb::arg("logits"), nb::arg("correction").none(),
          nb::arg("per_row"), nb::arg("normalised"), nb::arg("down"));
}

}  // namespace tiny_llm
