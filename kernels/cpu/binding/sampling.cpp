#include "../sampling.h"

#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

void check(bool ok, const char* expected) {
    if (!ok) throw std::invalid_argument(std::string("[sample] expected ") + expected);
}

mx::array sample(const mx::array& logits, const std::vector<double>& temperature, const std::vector<int64_t>& top_k,
                 const std::vector<double>& top_p, const std::vector<double>& min_p, const std::vector<uint64_t>& seeds,
                 const std::vector<uint64_t>& positions) {
    expect(logits.dtype() == mx::float32 && logits.ndim() == 2 && logits.shape(1) > 0, "sample",
           "logits float32 [R, V] of at least one value a row", logits);
    const size_t rows = logits.shape(0);
    for (size_t given : {temperature.size(), top_k.size(), top_p.size(), min_p.size(), seeds.size(), positions.size()})
        check(given == rows, "as many of each parameter as there are rows");
    std::vector<Draw> draws;
    for (size_t r = 0; r < rows; ++r) {
        check(temperature[r] >= 0 && top_k[r] >= 0 && top_p[r] > 0 && min_p[r] >= 0 && min_p[r] <= 1,
              "temperature >= 0, top_k >= 0, top_p > 0 and min_p from 0 to 1");
        // A temperature that is no float32 is cold, and not 0.
        const float warmth = temperature[r] > 0 ? std::fmax(static_cast<float>(temperature[r]), 1e-38f) : 0;
        draws.push_back({warmth, static_cast<float>(std::log(min_p[r])), top_p[r], top_k[r], seeds[r], positions[r]});
    }
    const int64_t vocab = logits.shape(1);
    return call("sample", {logits}, {{{static_cast<int>(rows)}, mx::uint32}}, [=, draws = std::move(draws)](auto& in, auto& out) {
        sampling({get<float>(in[0]), draws.data(), get<uint32_t>(out[0]), static_cast<int64_t>(rows), vocab});
    })[0];
}

}  // namespace

void bind_sampling(nb::module_& m) {
    m.def("sample", &sample, nb::arg("logits"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"),
          nb::arg("min_p"), nb::arg("seeds"), nb::arg("positions"), "One token a row of logits [R, V].");
}

}  // namespace tiny_llm
