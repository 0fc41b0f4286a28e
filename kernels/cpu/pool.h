// The threads that kernels share. Owns them and nothing else.
//
// Work is taken in small chunks by whoever is there: a thread that the system has put aside is not
// waited for, unless it holds a chunk. Nobody spins for longer than some microseconds.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tiny_llm {

// Calls run(context, begin, end) over [0, count) in chunks of at most `grain`, on the pool's threads and
// the caller's. Returns when all is done. A second caller at the same time does its work alone.
void parallel_chunks(int64_t count, int64_t grain, void (*run)(void*, int64_t, int64_t), void* context);

// Threads that work together, the caller's included: the physical cores by default.
int num_threads();

// Change their number (at least 1). Waits for work that is under way.
void set_num_threads(int threads);

// Physical cores that this process may use, after affinity and container limits.
int physical_cores();

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
