#include "swiglu.h"

#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {

namespace {

// begin 2.7 gate_range
// out = silu(gate) * up, for the numbers from `begin` to, and without, `end`.
void gate_range(const SwiGlu& a, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) store(a.out + i, silu(load(a.gate + i)) * load(a.up + i));
    const int64_t left = end - i;
    const vf last = silu(load_part(a.gate + i, left, 0)) * load_part(a.up + i, left, 0);
    store_part(a.out + i, last, left);
}
// end 2.7

}  // namespace

void swiglu(const SwiGlu& a) {
    parallel_for(a.count, 8192, [&](int64_t begin, int64_t end) { gate_range(a, begin, end); });
}

}  // namespace tiny_llm::TINY_ISA
