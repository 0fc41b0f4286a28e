// quantized_matmul for many rows, by AMX's tiles: int8 activations only, and the same bits, as the integers between
// two float operations are exact. On other processors, where plain C++ stands for tiles, tests alone call it.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace tiny_llm {

// The fewest with which this way was seen to win, on Granite Rapids: 1.13 to 1.34 times as fast as AVX-512 (book/log.md).
constexpr int64_t kRowsForTiles = 16;

TINY_KERNEL(tile_matmul, Linear)
#if defined(TINY_X86_SETS)
namespace amx { void tile_matmul(const Linear& args); }
#endif

}  // namespace tiny_llm
