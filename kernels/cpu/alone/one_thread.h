// What kernel files ask of the thread pool, for a library with one thread: the course's, of a learner's kernel.
#pragma once

#include <stdlib.h>

#include "../pool.h"

namespace tiny_llm {

void parallel_chunks(int64_t count, int64_t grain, void (*run)(void*, int64_t, int64_t), void* context) noexcept {
    for (int64_t at = 0; at < count; at += grain) run(context, at, count - at < grain ? count : at + grain);
}

static size_t held[kScratchSlots];  // bytes

void* scratch(int slot, size_t bytes) {
    static void* buffers[kScratchSlots];
    if (bytes <= held[slot]) return buffers[slot];
    free(buffers[slot]);
    held[slot] = (bytes + 63) / 64 * 64;
    return buffers[slot] = aligned_alloc(64, held[slot]);
}

}  // namespace tiny_llm

// Bytes of all buffers that kernels work in, kept from call to call.
extern "C" int64_t scratch_bytes() {
    int64_t bytes = 0;
    for (const size_t one : tiny_llm::held) bytes += one;
    return bytes;
}
