// What kernels and their simulator share. run.py has the structures Launch, Buffer and Report too.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef int s32;
typedef long s64;
typedef decltype(sizeof(0)) size_t;

struct msim_thread {
  u32 thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
  u32 threads_per_grid[3], threadgroups_per_grid[3], threads_per_threadgroup[3];
  u32 dispatch_threads_per_threadgroup[3], grid_origin[3], grid_size[3];
  u32 thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  u32 thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
  u32 simdgroups_per_threadgroup, quadgroups_per_threadgroup;
  u32 dispatch_simdgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
  u32 threads_per_simdgroup, thread_execution_width;
};

// What the lanes of a simdgroup give to one operation; `active` has a bit for each lane that takes part.
struct Exchange {
  alignas(16) u8 in[32][64];
  u32 active;
};

enum Op : u32 { OP_BARRIER, OP_SHUFFLE, OP_REDUCE, OP_SCAN, OP_VOTE, OP_MATRIX };

// A call of these stays where the author has it: the place tells one barrier from another.
#define MSIM_IN_STEP __attribute__((convergent, nomerge))
extern "C" {
const msim_thread* msim_me();
MSIM_IN_STEP Exchange* msim_collective(u32 op, const void* in, u32 bytes, u32 flags);
MSIM_IN_STEP void msim_barrier(u32 flags);
void* msim_array(u32 id, u32 bytes, u32 element, const char* name);
void msim_atomic(void* at, u32 bytes, bool write, bool read);
}

constexpr u32 MAX_BUFFERS = 96;
enum Role : u32 { INPUT, OUTPUT, MUTABLE };
enum Kind : u32 {
  NONE, BOUNDS, RACE, UNINITIALISED, NEVER_WRITTEN, INPUT_WRITTEN, MISALIGNED, BARRIER_DIVERGENCE,
  SIMD_DIVERGENCE, TIME_LIMIT, TOO_MUCH_MEMORY, WILD, UNDEFINED, NO_MEMORY
};

struct Buffer {
  u8* data;
  u64 bytes, read, written, fetched, loads;  // fetched: read, an element once a threadgroup
  u32 element, role, must_be_written, unused;
};

struct Launch {
  void (*kernel)(void* const*);
  Buffer* buffer;
  void** pointers;
  u8* image;
  u64 image_bytes, simd_operations, barriers;
  double seconds;
  u32 grid[3], threads[3];
  u32 buffers, seed;
};

struct Side {
  u64 pc;
  u32 group, thread, write;
};

struct Report {
  u32 kind, bytes, element, op, ended;
  s32 buffer;
  s64 offset;
  u64 size;
  const char* name;
  Side here, there;
};
