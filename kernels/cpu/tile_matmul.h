// quantized_matmul for many rows, by AMX's tiles: int8 activations only, and the same bits, as the integers between
// two float operations are exact. On other processors, where tiles are emulated, tests alone call it.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace tiny_llm {

constexpr int64_t kRowsForTiles = 64;  // with 8 to 32, AVX-512 was up to 1.25 times as fast on Granite Rapids

TINY_KERNEL(tile_matmul, Linear)
#if defined(TINY_X86_SETS)
namespace amx { void tile_matmul(const Linear& args); }
#endif

}  // namespace tiny_llm
