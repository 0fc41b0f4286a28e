// The threads that kernels share. Owns them and nothing else.
//
// Work is taken in chunks by whoever is there: a thread that the system has put aside is not waited
// for, unless it holds a chunk. Each begins in a range of its own, so that it reads memory in order.
// Nobody spins for longer than some microseconds. A chunk is best 2 to 50 us of work (64 to 256 KB where
// memory is the limit), and there are best four or more a thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cores.h"

namespace tiny_llm {

// Calls run(context, begin, end) until [0, count) is done: begin is a multiple of grain, end is
// min(begin + grain, count), however many threads there are. `run` may call this again, and must not throw.
// A second caller at the same time works alone, chunk by chunk, until the pool is free.
void parallel_chunks(int64_t count, int64_t grain, void (*run)(void*, int64_t, int64_t), void* context) noexcept;

// Threads that work together, the caller's included: $TINY_LLM_THREADS, else the physical cores.
int num_threads();

// Change their number, to 1 ... kMostThreads. Waits for work that is under way; not from inside of it.
void set_num_threads(int threads);
constexpr int kMostThreads = 1024;

// This thread's own buffer number `slot`, at least `bytes` long, 64-byte aligned; kept until the thread ends.
void* scratch(int slot, size_t bytes);
constexpr int kScratchSlots = 8;

}  // namespace tiny_llm

#ifdef TINY_ISA
namespace tiny_llm::TINY_ISA {

// parallel_chunks for a lambda (begin, end). Below `grain` items no other thread is asked.
template <class Body>
static inline void parallel_for(int64_t count, int64_t grain, const Body& body) {
    parallel_chunks(count, grain, [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
    }, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace tiny_llm::TINY_ISA
#endif
