// A sum's norm as a small library with a C interface; see quantized_rows.cpp.
#include "../rms_norm.h"

#include "one_thread.h"

namespace tiny_llm::TINY_ISA { void rms_norm(const RmsNorm& args); }

extern "C" void add_rms_norm(const float* x, const float* residual, const float* weight, float* sum, float* out,
                             int64_t rows, int64_t width, float eps) {
    tiny_llm::TINY_ISA::rms_norm({x, residual, weight, sum, out, rows, width, eps});
}
