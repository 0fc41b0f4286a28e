// Runs one dispatch of a kernel: a fiber a thread, threadgroup after threadgroup, on one core.
// With MSIM_STRICT every access of memory is checked first. Includes nothing, so that any clang can build it.
#include "conversions.h"
#include "fibers.h"
#include "runtime.h"

extern "C" {
void* mmap(void*, size_t, int, int, int, long);
int munmap(void*, size_t);
void* memcpy(void*, const void*, size_t);
void* memset(void*, int, size_t);
struct msim_timespec { long seconds, nanoseconds; };
int clock_gettime(int, msim_timespec*);
}

#ifndef MSIM_STRICT
#define MSIM_STRICT 0
#endif

namespace {
constexpr bool STRICT = MSIM_STRICT;
constexpr u32 MAX_THREADS = 1024, MAX_ARRAYS = 64;
constexpr size_t STACK = 256 * 1024, RESERVED = size_t(1) << 32, MARGIN = size_t(1) << 30;
constexpr u32 MEMORY = 32 * 1024, RED_ZONE = 64, ARRAYS_END = MEMORY + MAX_ARRAYS * 2 * RED_ZONE;

enum State : u8 { READY, AT_SIMD, AT_BARRIER, ENDED };

struct Fiber {
  msim_thread thread;
  void* stack_pointer;
  u64 pc;
  u32 op, bytes, flags;
  State state;
};

struct Simdgroup {
  Exchange exchange[2];
  u32 turn, waiting, alive, lanes;
  u32 epoch[2];  // of threadgroup memory, of device memory
};

// One access as the checker remembers it; clock 0: never.
struct Access {
  u64 pc;
  u32 group, epoch, simd_epoch;
  u16 thread;
  bool atomic, ever;
};

struct Cell {
  Access write, read, read_too;
};

struct Array {
  const char* name;
  u32 id, offset, bytes, element;
  Cell* cells;
};

Launch* launch;
Report* report;
Fiber fibers[MAX_THREADS];
Simdgroup simdgroups[MAX_THREADS / 32];
Fiber* me;
void* scheduler;
u8* stacks;
bool stopped;
u32 threads, alive, at_barrier, group_number;
u32 epoch[2];
u64 ticks, deadline;
u32 random_state;

Array arrays[MAX_ARRAYS];
u32 array_count, array_end;
alignas(64) u8 memory[ARRAYS_END];
#if MSIM_STRICT
u8 owner[ARRAYS_END];  // which array, counted from 1, a byte belongs to
u8* arena;
Cell* buffer_cells[MAX_BUFFERS];
u32* fetched_by[MAX_BUFFERS];  // the threadgroup, counted from 1, that read an element last
#endif

u64 now() {
  msim_timespec t;
  clock_gettime(1, &t);
  return u64(t.seconds) * 1000000000 + u64(t.nanoseconds);
}

u32 random_below(u32 bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state % bound;
}

void shuffle(u32* order, u32 count) {
  for (u32 i = 0; i < count; ++i) order[i] = i;
  for (u32 i = count; STRICT && i > 1; --i) {
    u32 j = random_below(i), kept = order[i - 1];
    order[i - 1] = order[j], order[j] = kept;
  }
}

u8* map(size_t bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, 0x2 | 0x20 | 0x4000, -1, 0);  // private, anonymous, no reserve
  return at == (void*)-1 ? nullptr : (u8*)at;
}

void leave() {
  Fiber* from = me;
  msim_switch(&from->stack_pointer, scheduler);
}

Side side_of(const Fiber& f, u64 pc, bool write) {
  return {pc, group_number, f.thread.thread_index_in_threadgroup, write};
}

// Notes the first fault and ends the dispatch; called on a fiber, it does not return.
void fault(Kind kind, u64 pc, Report what, const Fiber* who = nullptr) {
  if (!who) who = me;
  if (!stopped) {
    *report = what;
    report->kind = kind;
    if (who) report->here = side_of(*who, pc, what.here.write);
    stopped = true;
  }
  if (me) leave();
}

// `one` waits for `other`, which does not come to where it is.
void divergence(Kind kind, const Fiber& one, const Fiber& other, u32 op = 0) {
  Report what{};
  what.there = side_of(other, other.pc, false);
  what.op = op;
  what.ended = other.state == ENDED;
  fault(kind, one.pc, what, &one);
}

inline void tick(u64 weight, u64 pc) {
  ticks += weight;
  if ((ticks & 0xffff) < weight && now() > deadline) fault(TIME_LIMIT, pc, {});
}

void run_fiber() {
  launch->kernel(launch->pointers);
  me->state = ENDED;
  leave();
  __builtin_trap();
}

void start(Fiber& f) {
  u64* top = (u64*)(stacks + STACK * (&f - fibers + 1)) - FRAME;
  memset(top, 0, FRAME * sizeof(u64));
  top[RETURN_TO] = (u64)run_fiber;
  f.stack_pointer = top;
  f.state = READY;
}

void release_simdgroup(u32 number) {
  Simdgroup& group = simdgroups[number];
  Exchange& exchange = group.exchange[group.turn & 1];
  u32 first = number * 32, flags = ~0u;
  const Fiber* one = nullptr;
  exchange.active = 0;
  for (u32 i = 0; i < group.lanes; ++i) {
    Fiber& f = fibers[first + i];
    if (f.state != AT_SIMD) continue;
    exchange.active |= 1u << i;
    flags &= f.flags;
    if (!one) one = &f;
    if (f.op != one->op || (STRICT && f.pc != one->pc)) return divergence(SIMD_DIVERGENCE, *one, f, f.op);
  }
  for (u32 i = 0; STRICT && i < group.lanes; ++i)
    if (fibers[first + i].state != AT_SIMD) return divergence(SIMD_DIVERGENCE, *one, fibers[first + i], one->op);
  if (one->op == OP_BARRIER)
    for (u32 kind = 0; kind < 2; ++kind)
      if (flags & (kind ? 1 : 2)) ++group.epoch[kind];
  group.waiting = 0;
  ++group.turn;
  for (u32 i = 0; i < group.lanes; ++i)
    if (fibers[first + i].state == AT_SIMD) fibers[first + i].state = READY;
}

void release_barrier() {
  u32 flags = ~0u;
  const Fiber* one = nullptr;
  for (u32 i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    if (f.state == AT_BARRIER) flags &= f.flags, one = one ? one : &f;
  }
  for (u32 i = 0; STRICT && i < threads; ++i)
    if (fibers[i].state != AT_BARRIER || fibers[i].pc != one->pc)
      return divergence(BARRIER_DIVERGENCE, *one, fibers[i]);
  for (u32 kind = 0; kind < 2; ++kind)
    if (flags & (kind ? 1 : 2)) ++epoch[kind];
  at_barrier = 0;
  for (u32 i = 0; i < threads; ++i)
    if (fibers[i].state == AT_BARRIER) fibers[i].state = READY;
}

void ended(Fiber& f) {
  Simdgroup& group = simdgroups[f.thread.simdgroup_index_in_threadgroup];
  --group.alive, --alive;
  me = nullptr;
  if (group.alive && group.waiting == group.alive) release_simdgroup(f.thread.simdgroup_index_in_threadgroup);
  if (alive && at_barrier == alive) release_barrier();
}

// Runs lanes of a simdgroup until none of them can go on.
void run_simdgroup(u32 number) {
  u32 order[32];
  Simdgroup& group = simdgroups[number];
  shuffle(order, group.lanes);
  for (bool any = true; any && !stopped;) {
    any = false;
    for (u32 i = 0; i < group.lanes && !stopped; ++i) {
      Fiber& f = fibers[number * 32 + order[i]];
      if (f.state != READY) continue;
      any = true;
      me = &f;
      tick(16, 0);
      msim_switch(&scheduler, f.stack_pointer);
      me = nullptr;
      if (f.state == ENDED && !stopped) ended(f);
    }
  }
}

void stuck() {
  const Fiber *waits = nullptr, *other = nullptr;
  for (u32 i = 0; i < threads; ++i)
    if (fibers[i].state == AT_SIMD) waits = waits ? waits : &fibers[i];
  u32 number = waits->thread.simdgroup_index_in_threadgroup;
  for (u32 i = number * 32; i < number * 32 + simdgroups[number].lanes; ++i)
    if (fibers[i].state != AT_SIMD) other = &fibers[i];
  divergence(SIMD_DIVERGENCE, *waits, *other, waits->op);
}

void run_threadgroup(const u32 at[3]) {
  const u32 *grid = launch->grid, *full = launch->threads;
  u32 size[3], groups[3];
  for (u32 i = 0; i < 3; ++i) {
    groups[i] = (grid[i] + full[i] - 1) / full[i];
    size[i] = grid[i] - at[i] * full[i] < full[i] ? grid[i] - at[i] * full[i] : full[i];
  }
  threads = alive = size[0] * size[1] * size[2];
  at_barrier = 0;
  epoch[0] = epoch[1] = 1;
  group_number = at[0] + groups[0] * (at[1] + groups[1] * at[2]);
  u32 count = (threads + 31) / 32;
  for (u32 i = 0; i < count; ++i) {
    Simdgroup& group = simdgroups[i];
    group.turn = group.waiting = 0;
    group.epoch[0] = group.epoch[1] = 1;
    group.lanes = group.alive = threads - i * 32 < 32 ? threads - i * 32 : 32;
  }
  for (u32 i = 0; i < threads; ++i) {
    msim_thread& t = fibers[i].thread;
    u32 place[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (u32 k = 0; k < 3; ++k) {
      t.thread_position_in_threadgroup[k] = place[k];
      t.threadgroup_position_in_grid[k] = at[k];
      t.thread_position_in_grid[k] = at[k] * full[k] + place[k];
      t.threads_per_threadgroup[k] = size[k];
      t.dispatch_threads_per_threadgroup[k] = full[k];
      t.threads_per_grid[k] = t.grid_size[k] = grid[k];
      t.threadgroups_per_grid[k] = groups[k];
      t.grid_origin[k] = 0;
    }
    t.thread_index_in_threadgroup = i;
    t.thread_index_in_simdgroup = i % 32;
    t.simdgroup_index_in_threadgroup = i / 32;
    t.thread_index_in_quadgroup = i % 4;
    t.quadgroup_index_in_threadgroup = i / 4;
    t.simdgroups_per_threadgroup = count;
    t.quadgroups_per_threadgroup = (threads + 3) / 4;
    u32 all = full[0] * full[1] * full[2];
    t.dispatch_simdgroups_per_threadgroup = (all + 31) / 32;
    t.dispatch_quadgroups_per_threadgroup = (all + 3) / 4;
    t.threads_per_simdgroup = t.thread_execution_width = 32;
    start(fibers[i]);
  }
  u32 order[MAX_THREADS / 32];
  while (alive && !stopped) {
    bool ready = false;
    shuffle(order, count);
    for (u32 i = 0; i < count && !stopped; ++i) run_simdgroup(order[i]);
    for (u32 i = 0; i < threads && !ready; ++i) ready = fibers[i].state == READY;
    if (alive && !ready && !stopped) stuck();
  }
}

}  // namespace

#if MSIM_STRICT
#include "checker.h"
#endif

extern "C" {
const msim_thread* msim_me() { return &me->thread; }

Exchange* msim_collective(u32 op, const void* in, u32 bytes, u32 flags) {
  u64 pc = (u64)__builtin_return_address(0) - 1;
  u32 number = me->thread.simdgroup_index_in_threadgroup;
  Simdgroup& group = simdgroups[number];
  Exchange& exchange = group.exchange[group.turn & 1];
  if (bytes) memcpy(exchange.in[me->thread.thread_index_in_simdgroup], in, bytes);
  me->pc = pc, me->op = op, me->flags = flags, me->state = AT_SIMD;
  ++launch->simd_operations;
  tick(16, pc);
  if (++group.waiting == group.alive) release_simdgroup(number);
  else leave();
  return &exchange;
}

void msim_barrier(u32 flags) {
  u64 pc = (u64)__builtin_return_address(0) - 1;
  me->pc = pc, me->flags = flags, me->state = AT_BARRIER;
  ++launch->barriers;
  tick(16, pc);
  if (++at_barrier == alive) release_barrier();
  else leave();
}

// Memory of the threadgroup array that statement `id` declares; the same for all threads of a threadgroup.
void* msim_array(u32 id, u32 bytes, u32 element, const char* name) {
  for (u32 i = 0; i < array_count; ++i)
    if (arrays[i].id == id) return memory + arrays[i].offset;
  u64 pc = (u64)__builtin_return_address(0) - 1;
  u32 used = bytes;
  for (u32 i = 0; i < array_count; ++i) used += arrays[i].bytes;
  if (used > MEMORY || array_count == MAX_ARRAYS) {
    Report what{};
    what.name = name, what.size = used, what.buffer = -1;
    fault(TOO_MUCH_MEMORY, pc, what);
  }
  Array& a = arrays[array_count++];
  a = {name, id, array_end, bytes, element, nullptr};
  array_end += (bytes + RED_ZONE - 1) / RED_ZONE * RED_ZONE + RED_ZONE;
#if MSIM_STRICT
  a.cells = (Cell*)map((bytes / element + 1) * sizeof(Cell), 3);
  memset(owner + a.offset, int(array_count), bytes);
#endif
  return memory + a.offset;
}

int msim_run(Launch* given, Report* answer) {
  launch = given, report = answer;
  *report = {};
  if (!stacks && !(stacks = map(STACK * MAX_THREADS, 3))) return NO_MEMORY;
  stopped = false, me = nullptr, ticks = 0;
  array_count = 0, array_end = RED_ZONE;
  random_state = given->seed * 2654435761u + 1;
  if (!random_state) random_state = 1;
  deadline = now() + u64(given->seconds * 1e9);
#if MSIM_STRICT
  memset(owner, 0, sizeof(owner));
  memset(memory, 0xA5, sizeof(memory));
  if (!place_buffers()) stopped = true, report->kind = NO_MEMORY;
#else
  for (u32 i = 0; i < given->buffers; ++i) given->pointers[i] = given->buffer[i].data;
#endif
  u32 groups[3];
  for (u32 i = 0; i < 3; ++i) groups[i] = (given->grid[i] + given->threads[i] - 1) / given->threads[i];
  u32 count = groups[0] * groups[1] * groups[2];
  u32* order = (u32*)map(size_t(count) * 4, 3);
  if (!order) return NO_MEMORY;
  shuffle(order, count);
  for (u32 i = 0; i < count && !stopped; ++i) {
    u32 at[3] = {order[i] % groups[0], order[i] / groups[0] % groups[1], order[i] / (groups[0] * groups[1])};
    run_threadgroup(at);
  }
  munmap(order, size_t(count) * 4);
#if MSIM_STRICT
  me = nullptr;
  take_back();
  for (u32 i = 0; i < array_count; ++i) munmap(arrays[i].cells, (arrays[i].bytes / arrays[i].element + 1) * sizeof(Cell));
#endif
  return report->kind;
}
}
