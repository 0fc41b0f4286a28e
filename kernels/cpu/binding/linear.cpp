#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../dense_matmul.h"
#include "../pack.h"
#include "../quantized_matmul.h"
#include "../swiglu.h"
#include "bindings.h"
#include "matrix.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

using Bias = std::optional<mx::array>;

void check(const char* op, const mx::array& x, const std::vector<PackedMatrix>& matrices, const std::vector<Bias>& biases) {
    expect(x.ndim() >= 2 && x.dtype() == mx::float32, op, "x float32 [T, I] or [T, H, D]", x);
    int64_t columns = 1;
    for (size_t i = 1; i < x.ndim(); ++i) columns *= x.shape(i);
    if (matrices.empty() || matrices.size() != biases.size())
        throw std::invalid_argument(std::string("[") + op + "] expected as many biases (or None) as matrices, at least one");
    for (size_t i = 0; i < matrices.size(); ++i) {
        const Matrix& m = matrices[i].layout;
        expect(m.count == 1, op, "a matrix, not a stack of them", matrices[i].data);
        expect(m.columns == columns, op, [&] { return "x of " + std::to_string(m.columns) + " columns"; }, x);
        if (biases[i])
            expect(biases[i]->dtype() == mx::float32 && biases[i]->shape() == mx::Shape{static_cast<int>(m.rows)}, op,
                   [&] { return "a bias float32 [" + std::to_string(m.rows) + "]"; }, *biases[i]);
    }
}

// Whether one kernel call takes both: it reads x once, in one way.
bool together(const Matrix& a, const Matrix& b) {
    if (!is_quantized(a.kind) || !is_quantized(b.kind)) return a.kind == b.kind;
    return a.group_size == b.group_size && a.exact == b.exact;
}

void run(const Linear& all);

// Gate and up that no one kernel takes: each by itself, then what joins them.
void run_apart(const Linear& all) {
    const int64_t count = all.rows * all.matrices[0].rows;
    std::vector<float> up(count);
    float* to[2] = {all.out[0], up.data()};
    run({all.x, all.rows, 2, all.matrices, all.biases, to, false});
    swiglu({all.out[0], up.data(), all.out[0], count});
}

void run(const Linear& all) {
    if (all.gated && !together(all.matrices[0], all.matrices[1])) return run_apart(all);
    for (int begin = 0, end = 0; begin < all.count; begin = end) {
        while (end < all.count && together(all.matrices[begin], all.matrices[end])) ++end;
        const Linear part{all.x, all.rows, end - begin, all.matrices + begin, all.biases + begin, all.out + begin, all.gated};
        is_quantized(part.matrices[0].kind) ? quantized_matmul(part) : dense_matmul(part);
    }
}

// [T, O], or with a head dim [T, O / head_dim, head_dim].
mx::Shape shape_of(int rows, const Matrix& m, int head_dim) {
    const int outputs = static_cast<int>(m.rows);
    return head_dim ? mx::Shape{rows, outputs / head_dim, head_dim} : mx::Shape{rows, outputs};
}

// Inputs: x, the matrices' data, the biases that there are. Outputs: one a matrix, or one if gated.
std::vector<mx::array> multiply(const char* op, const mx::array& x, const std::vector<PackedMatrix>& packed,
                                const std::vector<Bias>& biases, bool gated, int head_dim = 0) {
    check(op, x, packed, biases);
    std::vector<mx::array> inputs{x};
    std::vector<Spec> outputs;
    std::vector<Matrix> matrices;
    std::vector<int> bias_at;
    for (const auto& matrix : packed) {
        inputs.push_back(matrix.data);
        matrices.push_back(matrix.layout);
        if (!gated || outputs.empty())
            outputs.push_back({shape_of(x.shape(0), matrix.layout, head_dim), mx::float32});
    }
    for (const auto& bias : biases) {
        bias_at.push_back(bias ? static_cast<int>(inputs.size()) : -1);
        if (bias) inputs.push_back(*bias);
    }
    return call(op, std::move(inputs), std::move(outputs),
                [gated, rows = x.shape(0), matrices = std::move(matrices), bias_at = std::move(bias_at)](auto& in, auto& out) {
        std::vector<const float*> bias(matrices.size());
        std::vector<float*> to(matrices.size());
        for (size_t i = 0; i < matrices.size(); ++i) {
            bias[i] = bias_at[i] < 0 ? nullptr : get<float>(in[bias_at[i]]);
            to[i] = i < out.size() ? get<float>(out[i]) : nullptr;
        }
        run({get<float>(in[0]), rows, static_cast<int>(matrices.size()), matrices.data(), bias.data(), to.data(), gated});
    });
}

std::vector<mx::array> linear(const mx::array& x, const std::vector<PackedMatrix>& matrices, const std::vector<Bias>& biases,
                              int head_dim) {
    for (const auto& matrix : matrices)
        if (head_dim < 0 || (head_dim && matrix.layout.rows % head_dim))
            throw std::invalid_argument("[linear] expected a head dim that divides " + std::to_string(matrix.layout.rows) +
                                        " outputs, or 0, got " + std::to_string(head_dim));
    return multiply("linear", x, matrices, biases, false, head_dim);
}

mx::array gated(const mx::array& x, const PackedMatrix& gate, const PackedMatrix& up, const Bias& gate_bias, const Bias& up_bias) {
    if (gate.layout.rows != up.layout.rows)
        throw std::invalid_argument("[gated] expected gate and up of one shape, got " + std::to_string(gate.layout.rows) +
                                    " and " + std::to_string(up.layout.rows) + " rows");
    return multiply("gated", x, {gate, up}, {gate_bias, up_bias}, true)[0];
}

// Number i of a stack of `count`.
const uint8_t* bytes_of(const mx::array& a, int64_t i, int64_t count) { return a.data<uint8_t>() + a.nbytes() / count * i; }
char* room_of(const PackedMatrix& m, int64_t i) {
    return const_cast<char*>(m.layout.data) + i * tiles(m.layout) * tile_bytes(m.layout);
}

mx::array ready(const mx::array& a) {
    mx::array row_order = mx::contiguous(a, false, mx::Device::cpu);
    row_order.eval();
    return row_order;
}

PackedMatrix quantized(const mx::array& packed, const mx::array& scales, const mx::array& biases, int group_size,
                       int bits, bool exact) {
    const char* op = "pack_quantized";
    const bool is_stack = packed.ndim() == 3;
    expect((is_stack || packed.ndim() == 2) && packed.dtype() == mx::uint32, op, "packed uint32 [O, words] or [N, O, words]",
           packed);
    if (bits < 2 || bits > 8 || bits == 7)
        throw std::invalid_argument("[pack_quantized] expected 2, 3, 4, 5, 6 or 8 bits, got " + std::to_string(bits));
    if (group_size != 32 && group_size != 64 && group_size != 128)
        throw std::invalid_argument("[pack_quantized] expected groups of 32, 64 or 128, got " + std::to_string(group_size));
    const int64_t columns = int64_t{packed.shape(-1)} * 32 / bits, count = is_stack ? packed.shape(0) : 1;
    mx::Shape groups = packed.shape();
    groups.back() = static_cast<int>(columns / group_size);
    const std::string group = std::to_string(group_size);
    expect(packed.size() > 0 && packed.shape(-1) * 32 % bits == 0 && columns % group_size == 0, op,
           "rows, and columns a multiple of the group of " + group + " at " + std::to_string(bits) + " bits", packed);
    const std::string numbers = "scales and biases of one dtype, [" + std::to_string(packed.shape(-2)) + ", " +
                                std::to_string(groups.back()) + "]" + (is_stack ? " each" : "");
    expect(scales.shape() == groups, op, numbers, scales);
    expect(biases.shape() == groups && biases.dtype() == scales.dtype(), op, numbers, biases);
    const Matrix matrix{nullptr, packed.shape(-2), columns, bits <= 4 ? Kind::q4 : Kind::q8, kind_of(op, scales), group_size, exact, count};
    PackedMatrix result = make_matrix(matrix, tile_bytes(matrix));
    const mx::array p = ready(packed), s = ready(scales), b = ready(biases);
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < count; ++i)
        pack_quantized({bytes_of(p, i, count), bytes_of(s, i, count), bytes_of(b, i, count), bits}, result.layout,
                       reinterpret_cast<uint8_t*>(room_of(result, i)));
    return result;
}

PackedMatrix dense(const mx::array& weight, bool exact) {
    const bool is_stack = weight.ndim() == 3;
    expect((is_stack || weight.ndim() == 2) && weight.size() > 0, "pack_dense", "a weight [O, I] or [N, O, I]", weight);
    const Kind kind = kind_of("pack_dense", weight);
    const int64_t count = is_stack ? weight.shape(0) : 1;
    const Matrix matrix{nullptr, weight.shape(-2), weight.shape(-1), kind, kind, 0, exact, count};
    PackedMatrix result = make_matrix(matrix, tile_bytes(matrix));
    const mx::array source = ready(weight);
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < count; ++i) pack_dense(bytes_of(source, i, count), result.layout, room_of(result, i));
    return result;
}

}  // namespace

void bind_linear(nb::module_& m) {
    m.def("pack_quantized", &quantized, nb::arg("packed"), nb::arg("scales"), nb::arg("biases"), nb::arg("group_size"),
          nb::arg("bits"), nb::arg("exact"));
    m.def("pack_dense", &dense, nb::arg("weight"), nb::arg("exact") = true);
    m.def("linear", &linear, nb::arg("x"), nb::arg("weights"), nb::arg("biases"), nb::arg("head_dim") = 0,
          "Each weight's [T, O]; with a head dim each [T, O / head_dim, head_dim].");
    m.def("gated", &gated, nb::arg("x"), nb::arg("gate"), nb::arg("up"), nb::arg("gate_bias").none(), nb::arg("up_bias").none());
}

}  // namespace tiny_llm
