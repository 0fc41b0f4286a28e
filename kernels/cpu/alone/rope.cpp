// Rotation as a small library with a C interface; see quantized_rows.cpp.
#include "../rope.h"

#include "one_thread.h"

namespace tiny_llm::TINY_ISA { void rope(const Rope& args); }

// q [T, H, D] and k [T, K, D]; a norm [D], or null.
extern "C" void rope_qk(const float* q, const float* k, const float* q_norm, const float* k_norm, float* q_out, float* k_out,
                        const int32_t* positions, const float* inv_freq, int64_t tokens, int64_t heads, int64_t kv_heads,
                        int64_t dim, float eps) {
    tiny_llm::TINY_ISA::rope({{{q, q_norm, q_out, heads}, {k, k_norm, k_out, kv_heads}}, positions, inv_freq, tokens, dim, eps});
}
