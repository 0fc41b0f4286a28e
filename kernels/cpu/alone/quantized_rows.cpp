// One kernel file as a small library with a C interface: one instruction set, one thread, neither MLX nor a pool.
// What the course compiles together with a learner's kernel, and what it measures.
#include "../quantized_rows.h"

#include "one_thread.h"

namespace tiny_llm::TINY_ISA { void quantized_rows(const QuantizedRows& args); }

extern "C" void quantized_rows(const float* x, const uint32_t* words, const float* scales, const float* biases, float* out,
                               int64_t rows, int64_t inputs, int64_t outputs, int group, int bits) {
    tiny_llm::TINY_ISA::quantized_rows({x, words, scales, biases, out, rows, inputs, outputs, group, bits});
}
