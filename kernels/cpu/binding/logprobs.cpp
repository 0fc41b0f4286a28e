#include "../logprobs.h"

#include <nanobind/stl/tuple.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

std::tuple<mx::array, mx::array, mx::array> of_rows(const mx::array& logits, const mx::array& tokens, int count) {
    expect(logits.dtype() == mx::float32 && logits.ndim() == 2 && logits.shape(1) > 0, "logprobs",
           "logits float32 [R, V] of at least one value a row", logits);
    const int rows = logits.shape(0), vocab = logits.shape(1);
    expect(tokens.dtype() == mx::uint32 && tokens.shape() == mx::Shape{rows}, "logprobs",
           "tokens uint32 [" + std::to_string(rows) + "]", tokens);
    if (count < 0 || count > vocab)
        throw std::invalid_argument("[logprobs] expected a count from 0 to " + std::to_string(vocab) + ", got " +
                                    std::to_string(count));
    const mx::Shape best{rows, count};
    auto found = call("logprobs", {logits, tokens}, {{{rows}, mx::float32}, {best, mx::uint32}, {best, mx::float32}},
                      [=](auto& in, auto& out) {
        logprobs({get<float>(in[0]), get<uint32_t>(in[1]), get<float>(out[0]), get<uint32_t>(out[1]),
                  get<float>(out[2]), rows, vocab, count});
    });
    return {found[0], found[1], found[2]};
}

}  // namespace

void bind_logprobs(nb::module_& m) {
    m.def("logprobs", &of_rows, nb::arg("logits"), nb::arg("tokens"), nb::arg("count"),
          "Return (the tokens' log-probabilities [R], the likeliest ids [R, count], theirs).");
}

}  // namespace tiny_llm
