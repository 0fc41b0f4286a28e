// x times dense matrices, whose weights stay float32, bf16 or f16 as the checkpoint has them.
//
// Each output is one chain of float32 multiply-adds in the order of the inputs, whatever the number of rows.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace tiny_llm {

TINY_KERNEL(dense_matmul, Linear)

}  // namespace tiny_llm
