// Memory for what is streamed: huge pages, so that reading it once a token misses no page table.
#pragma once

#include <stddef.h>

#include <functional>

namespace tiny_llm {

struct Block {
    void* data;                     // 64-byte aligned, zeroed
    std::function<void()> release;  // call once; the pages go when every block in them has gone
};

// Throws std::bad_alloc without memory. Safe from several threads.
Block allocate_weights(size_t bytes);

// The same with pages of its own, which go when it goes: for what comes and goes beside weights that stay.
Block allocate_pool(size_t bytes);

}  // namespace tiny_llm
