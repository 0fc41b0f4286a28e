// What each file of this folder adds to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace tiny_llm {

void bind_argmax(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_chain(nanobind::module_& m);
void bind_embedding(nanobind::module_& m);
void bind_experts(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_logprobs(nanobind::module_& m);
void bind_matrix(nanobind::module_& m);
void bind_pages(nanobind::module_& m);
void bind_quantized_rows(nanobind::module_& m);
void bind_rms_norm(nanobind::module_& m);
void bind_rope(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_softmax(nanobind::module_& m);
void bind_swiglu(nanobind::module_& m);

}  // namespace tiny_llm
