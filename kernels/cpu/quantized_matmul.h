// x times quantized matrices. Owns the arithmetic that one row and a thousand rows share.
//
// int8 activations: x is rounded to int8 with one scale a row and group, so that a group's dot product is an exact
// int32, whatever instruction makes it. Then, group by group in order,
//     y = fma(dot * x_scale, scale, y);  y = fma(bias, x_sum, y)
// Exact activations: q becomes float and each input is one fma, into four sums a group whose order is fixed.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace tiny_llm {

TINY_KERNEL(quantized_matmul, Linear)
#if defined(TINY_X86_SETS)
namespace avx512bf16 { void quantized_matmul(const Linear& args); }
#elif defined(TINY_ARM_SETS)
namespace dotprod { void quantized_matmul(const Linear& args); }
namespace i8mm { void quantized_matmul(const Linear& args); }
#endif

}  // namespace tiny_llm
