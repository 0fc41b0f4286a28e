// The gated unit as a small library with a C interface; see quantized_rows.cpp.
#include "../swiglu.h"

#include "one_thread.h"

namespace tiny_llm::TINY_ISA { void swiglu(const SwiGlu& args); }

extern "C" void swiglu(const float* gate, const float* up, float* out, int64_t count) {
    tiny_llm::TINY_ISA::swiglu({gate, up, out, count});
}
