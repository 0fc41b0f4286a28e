// One kernel file as a small library with a C interface: one instruction set, one thread, neither MLX nor a pool.
// What the course compiles together with a learner's kernel, and what it measures.
#include "../quantized_rows.h"

#include <stdlib.h>

#include "../pool.h"

namespace tiny_llm {

namespace TINY_ISA { void quantized_rows(const QuantizedRows& args); }

void parallel_chunks(int64_t count, int64_t, void (*run)(void*, int64_t, int64_t), void* context) noexcept {
    if (count > 0) run(context, 0, count);
}

void* scratch(int slot, size_t bytes) {
    static thread_local void* buffers[kScratchSlots] = {};
    return buffers[slot] = realloc(buffers[slot], bytes + 64);
}

}  // namespace tiny_llm

extern "C" void quantized_rows(const float* x, const uint32_t* words, const float* scales, const float* biases, float* out,
                               int64_t rows, int64_t inputs, int64_t outputs, int group, int bits) {
    tiny_llm::TINY_ISA::quantized_rows({x, words, scales, biases, out, rows, inputs, outputs, group, bits});
}
