// x times dense matrices, whose weights stay float32, bf16 or f16 as the checkpoint has them.
//
// Each output is one chain of float32 multiply-adds in the order of the inputs, whatever the number of rows.
// With AVX512-BF16, where weights are bf16 and not `exact`, x is rounded to bf16 too: two inputs go at once.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace tiny_llm {

TINY_KERNEL(dense_matmul, Linear)
#if defined(TINY_X86_SETS)
namespace avx512bf16 { void dense_matmul(const Linear& args); }
#endif

}  // namespace tiny_llm
