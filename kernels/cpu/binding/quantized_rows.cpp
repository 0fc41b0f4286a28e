#include "../quantized_rows.h"

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

mx::array multiply(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                   int group, int bits) {
    const char* op = "quantized_rows";
    if (bits != 2 && bits != 4 && bits != 8)
        throw std::invalid_argument("[quantized_rows] expected 2, 4 or 8 bits, got " + std::to_string(bits));
    if (group != 32 && group != 64 && group != 128)
        throw std::invalid_argument("[quantized_rows] expected groups of 32, 64 or 128, got " + std::to_string(group));
    expect(words.ndim() == 2 && words.dtype() == mx::uint32, op, "words uint32 [O, I * bits / 32]", words);
    const int64_t outputs = words.shape(0), inputs = int64_t{words.shape(1)} * 32 / bits;
    expect(inputs > 0 && inputs % group == 0, op, [&] { return "words of whole groups of " + std::to_string(group); }, words);
    expect(x.ndim() == 2 && x.dtype() == mx::float32 && x.shape(1) == inputs, op,
           [&] { return "x float32 [T, " + std::to_string(inputs) + "]"; }, x);
    const mx::Shape groups{words.shape(0), static_cast<int>(inputs / group)};
    for (const mx::array& numbers : {scales, biases})
        expect(numbers.dtype() == mx::float32 && numbers.shape() == groups, op, [&] {
            return "scales and biases float32 [" + std::to_string(groups[0]) + ", " + std::to_string(groups[1]) + "]";
        }, numbers);
    const int64_t rows = x.shape(0);
    return call(op, {x, words, scales, biases}, {{{x.shape(0), words.shape(0)}, mx::float32}}, [=](auto& in, auto& out) {
        quantized_rows({get<float>(in[0]), get<uint32_t>(in[1]), get<float>(in[2]), get<float>(in[3]), get<float>(out[0]),
                        rows, inputs, outputs, group, bits});
    })[0];
}

}  // namespace

void bind_quantized_rows(nb::module_& m) {
    m.def("quantized_rows", &multiply, nb::arg("x"), nb::arg("words"), nb::arg("scales"), nb::arg("biases"),
          nb::arg("group_size"), nb::arg("bits"), "Return x w^T for w in MLX's affine format, not packed.");
}

}  // namespace tiny_llm
