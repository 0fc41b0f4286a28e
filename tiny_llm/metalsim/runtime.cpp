// Runs one dispatch of a kernel: a fiber a thread, threadgroup after threadgroup, on one core.
// With MSIM_STRICT every access of memory is checked first. Includes nothing, so that any clang can build it.
#include "runtime.h"

extern "C" {
void* mmap(void*, size_t, int, int, int, long);
int munmap(void*, size_t);
void* memcpy(void*, const void*, size_t);
void* memset(void*, int, size_t);
struct msim_timespec { long seconds, nanoseconds; };
int clock_gettime(int, msim_timespec*);
}

namespace {
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
#if MSIM_STRICT
  for (u32 i = count; i > 1; --i) {
    u32 j = random_below(i), kept = order[i - 1];
    order[i - 1] = order[j], order[j] = kept;
  }
#endif
}

u8* map(size_t bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, 0x2 | 0x20 | 0x4000, -1, 0);  // private, anonymous, no reserve
  return at == (void*)-1 ? nullptr : (u8*)at;
}
}  // namespace

// ---- switching fibers: msim_switch(where to keep this stack pointer, the one to go on with)

extern "C" void msim_switch(void** keep, void* go_on);
#if defined(__x86_64__)
asm(".text\n.globl msim_switch\n.hidden msim_switch\nmsim_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n");
constexpr u32 FRAME = 8, RETURN_TO = 6;  // words kept, and which of them is the return address
#elif defined(__aarch64__)
asm(".text\n.globl msim_switch\n.hidden msim_switch\nmsim_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
constexpr u32 FRAME = 20, RETURN_TO = 11;
#else
#error "metalsim switches fibers on x86-64 and arm64 only"
#endif

namespace {
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
  u32 first = number * 32, flags = ~0u, count = 0;
  const Fiber* one = nullptr;
  exchange.active = 0;
  for (u32 i = 0; i < group.lanes; ++i) {
    Fiber& f = fibers[first + i];
    if (f.state != AT_SIMD) continue;
    exchange.active |= 1u << i;
    flags &= f.flags;
    if (!one) one = &f;
    ++count;
#if MSIM_STRICT
    if (f.pc != one->pc || f.op != one->op) {
      Report what{};
      what.there = side_of(f, f.pc, false);
      what.op = f.op;
      return fault(SIMD_DIVERGENCE, one->pc, what, one);
    }
#else
    if (f.op != one->op) {
      Report what{};
      what.there = side_of(f, f.pc, false);
      what.op = f.op;
      return fault(SIMD_DIVERGENCE, one->pc, what, one);
    }
#endif
  }
#if MSIM_STRICT
  if (count < group.lanes)
    for (u32 i = 0; i < group.lanes; ++i)
      if (fibers[first + i].state != AT_SIMD) {
        Report what{};
        what.there = side_of(fibers[first + i], fibers[first + i].pc, false);
        what.op = one->op;
        what.ended = fibers[first + i].state == ENDED;
        return fault(SIMD_DIVERGENCE, one->pc, what, one);
      }
#endif
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
#if MSIM_STRICT
  for (u32 i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    if (f.state == AT_BARRIER && f.pc == one->pc) continue;
    Report what{};
    what.there = side_of(f, f.pc, false);
    what.ended = f.state == ENDED;
    return fault(BARRIER_DIVERGENCE, one->pc, what, one);
  }
#endif
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
  Report what{};
  what.op = waits->op;
  what.there = side_of(*other, other->pc, false);
  fault(SIMD_DIVERGENCE, waits->pc, what, waits);
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

#if MSIM_STRICT
bool ordered(const Access& a, u32 kind) {
  if (a.group != group_number) return false;
  if (a.epoch < epoch[kind]) return true;
  u32 mine = me->thread.simdgroup_index_in_threadgroup;
  return a.thread / 32 == mine && a.simd_epoch < simdgroups[mine].epoch[kind];
}

// Whether `a` and an access by this thread now would be a race.
bool clashes(const Access& a, u32 kind, bool atomic) {
  if (!a.ever || (a.atomic && atomic)) return false;
  bool same = a.group == group_number && a.thread == me->thread.thread_index_in_threadgroup;
  return !same && !ordered(a, kind);
}

struct Place {
  Cell* cells;
  s64 offset;
  u32 element, kind;  // 0: threadgroup memory, 1: device memory
  s32 buffer;
  const char* name;
  bool initialised;
};

Report about(const Place& p, s64 offset, u32 bytes, bool write) {
  Report what{};
  what.buffer = p.buffer, what.offset = offset, what.bytes = bytes, what.name = p.name;
  what.element = p.element;
  what.here.write = write;
  return what;
}

void check_cells(const Place& p, u32 bytes, bool write, bool read, bool atomic, u64 pc) {
  u32 simdgroup = me->thread.simdgroup_index_in_threadgroup;
  Access mine = {pc, group_number, epoch[p.kind], simdgroups[simdgroup].epoch[p.kind],
                 u16(me->thread.thread_index_in_threadgroup), atomic, true};
  for (u64 i = p.offset / p.element; i <= (p.offset + bytes - 1) / p.element; ++i) {
    Cell& cell = p.cells[i];
    if (p.kind == 0 && cell.write.group != group_number) cell.write.ever = false;
    if (p.kind == 0 && cell.read.group != group_number) cell.read.ever = false;
    if (p.kind == 0 && cell.read_too.group != group_number) cell.read_too.ever = false;
    if (read && !cell.write.ever && !p.initialised)
      return fault(UNINITIALISED, pc, about(p, i * p.element, bytes, false));
    const Access* other = nullptr;
    if (clashes(cell.write, p.kind, atomic)) other = &cell.write;
    if (write && !other && clashes(cell.read, p.kind, atomic)) other = &cell.read;
    if (write && !other && clashes(cell.read_too, p.kind, atomic)) other = &cell.read_too;
    if (other) {
      Report what = about(p, i * p.element, bytes, write);
      what.there = {other->pc, other->group, other->thread, other == &cell.write};
      return fault(RACE, pc, what);
    }
    if (write) {
      cell.write = mine;
    }
    if (read && !write) {
      bool first = !cell.read.ever || ordered(cell.read, p.kind) ||
                   (cell.read.group == mine.group && cell.read.thread == mine.thread);
      if (first) cell.read = mine;
      else cell.read_too = mine;
    }
  }
}

void count_read(Buffer& b, u32* by, u64 offset, u32 bytes) {
  b.read += bytes;
  for (u64 i = offset / b.element; i <= (offset + bytes - 1) / b.element; ++i)
    if (by[i] != group_number + 1) by[i] = group_number + 1, b.fetched += b.element;
}

void check(u64 at, u32 bytes, bool write, bool read, bool atomic, u32 alignment, u64 pc) {
  if (at - (u64)stacks < STACK * MAX_THREADS) return;
  tick(1, pc);
  Place p{};
  u64 inside = at - (u64)memory;
  if (inside < sizeof(memory)) {
    u32 number = owner[inside];
    if (!number || inside + bytes > arrays[number - 1].offset + arrays[number - 1].bytes) {
      if (!number)  // the nearest array that begins before
        for (u32 i = 0; i < array_count; ++i)
          if (arrays[i].offset <= inside) number = i + 1;
      if (!number) number = 1;
      const Array& a = arrays[number - 1];
      p.name = a.name, p.element = a.element, p.buffer = -1;
      Report what = about(p, s64(inside) - a.offset, bytes, write);
      what.size = a.bytes;
      return fault(BOUNDS, pc, what);
    }
    const Array& a = arrays[number - 1];
    p = {a.cells, s64(inside) - a.offset, a.element, 0, -1, a.name, false};
  } else {
    u64 slot = (at - (u64)arena) / RESERVED;
    if (at < (u64)arena || slot >= launch->buffers) {
      if (at - (u64)launch->image < launch->image_bytes) return;
      if (at - (u64)fibers < sizeof(fibers)) return;
      Report what{};
      what.here.write = write, what.offset = s64(at), what.bytes = bytes;
      return fault(WILD, pc, what);
    }
    Buffer& b = launch->buffer[slot];
    s64 offset = s64(at - (u64)arena - slot * RESERVED) - s64(MARGIN);
    p = {buffer_cells[slot], offset, b.element, 1, s32(slot), nullptr, b.role != OUTPUT};
    if (offset < 0 || u64(offset) + bytes > b.bytes) {
      Report what = about(p, offset, bytes, write);
      what.size = b.bytes;
      return fault(BOUNDS, pc, what);
    }
    if (write && b.role == INPUT) return fault(INPUT_WRITTEN, pc, about(p, offset, bytes, write));
    if (read) count_read(b, fetched_by[slot], u64(offset), bytes);
    if (write) b.written += bytes;
  }
  if (at % alignment) {
    Report what = about(p, p.offset, bytes, write);
    what.size = alignment;
    return fault(MISALIGNED, pc, what);
  }
  if (p.cells) check_cells(p, bytes, write, read, atomic, pc);
}

bool place_buffers() {
  arena = map(RESERVED * launch->buffers + RESERVED, 0);
  if (!arena) return false;
  for (u32 i = 0; i < launch->buffers; ++i) {
    Buffer& b = launch->buffer[i];
    u8* start = arena + RESERVED * i + MARGIN;
    size_t bytes = (b.bytes + 4095) / 4096 * 4096;
    if (b.bytes > MARGIN) return false;
    if (bytes && mmap(start, bytes, 3, 0x2 | 0x10 | 0x20 | 0x4000, -1, 0) == (void*)-1) return false;
    if (b.role == OUTPUT) memset(start, 0xA5, b.bytes);  // as good as anything: nobody is to rely on it
    else memcpy(start, b.data, b.bytes);
    launch->pointers[i] = start;
    buffer_cells[i] = nullptr;
    size_t cells = (b.bytes + b.element - 1) / b.element;
    fetched_by[i] = nullptr;
    if (cells && !(fetched_by[i] = (u32*)map(cells * sizeof(u32), 3))) return false;
    if (b.role != INPUT && cells && !(buffer_cells[i] = (Cell*)map(cells * sizeof(Cell), 3))) return false;
  }
  return true;
}

void take_back() {
  for (u32 i = 0; arena && i < launch->buffers; ++i) {
    Buffer& b = launch->buffer[i];
    size_t cells = (b.bytes + b.element - 1) / b.element;
    if (b.role == OUTPUT && b.must_be_written && !stopped && buffer_cells[i])
      for (size_t c = 0; c < cells; ++c)
        if (!buffer_cells[i][c].write.ever) {
          Report what{};
          what.buffer = s32(i), what.offset = s64(c * b.element), what.element = b.element;
          for (size_t d = c; d < cells; ++d) what.size += !buffer_cells[i][d].write.ever;
          fault(NEVER_WRITTEN, 0, what);
          break;
        }
    if (b.role != INPUT && !stopped) memcpy(b.data, launch->pointers[i], b.bytes);
    if (fetched_by[i]) munmap(fetched_by[i], cells * sizeof(u32));
    if (buffer_cells[i]) munmap(buffer_cells[i], cells * sizeof(Cell));
    buffer_cells[i] = nullptr, fetched_by[i] = nullptr;
  }
  if (arena) munmap(arena, RESERVED * launch->buffers + RESERVED);
  arena = nullptr;
}
#endif
}  // namespace

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

// Rounds to nearest even; compilers call these where the processor has no such instruction.
static u16 round_bits(u32 bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return u16(bits >> 16 | 0x40);
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__bf16 __truncsfbf2(float x) {
  u16 bits = round_bits(__builtin_bit_cast(u32, x));
  return __builtin_bit_cast(__bf16, bits);
}

__bf16 __truncdfbf2(double x) {
  float f = float(x);
  u32 bits = __builtin_bit_cast(u32, f);
  // Round to odd, so that rounding again rounds as once.
  if (double(f) != x && !(bits & 1)) bits = (double(f) > x) == (x > 0) ? bits - 1 : bits + 1;
  u16 rounded = round_bits(bits);
  return __builtin_bit_cast(__bf16, rounded);
}

float __extendhfsf2(_Float16 x) {
  u16 h = __builtin_bit_cast(u16, x);
  u32 sign = u32(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) bits = sign | (rest + (112 << 10)) << 13;
  else {
    float small = float(int(rest)) * 0x1p-24f;
    bits = sign | __builtin_bit_cast(u32, small);
  }
  return __builtin_bit_cast(float, bits);
}

_Float16 __truncsfhf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff, half;
  if (rest > 0x7f800000) half = 0x7e00;
  else if (rest >= 0x477ff000) half = 0x7c00;
  else if (rest < 0x38800000) {
    float sum = __builtin_bit_cast(float, rest) + 0.5f;  // the sum's last bit is half's smallest number
    half = __builtin_bit_cast(u32, sum) - 0x3f000000;
  } else half = (rest + 0xfff + (rest >> 13 & 1) - (112 << 23)) >> 13;
  u16 result = u16(sign | half);
  return __builtin_bit_cast(_Float16, result);
}

_Float16 __truncdfhf2(double x) {
  float f = float(x);
  u32 bits = __builtin_bit_cast(u32, f);
  if (double(f) != x && !(bits & 1)) bits = (double(f) > x) == (x > 0) ? bits - 1 : bits + 1;
  return __truncsfhf2(__builtin_bit_cast(float, bits));
}

#if MSIM_STRICT
#define HERE ((u64)__builtin_return_address(0) - 1)
#define ACCESS(n)                                                                                       \
  void __tsan_read##n(void* at) { check((u64)at, n, false, true, false, n, HERE); }                     \
  void __tsan_write##n(void* at) { check((u64)at, n, true, false, false, n, HERE); }                    \
  void __tsan_unaligned_read##n(void* at) { check((u64)at, n, false, true, false, 1, HERE); }           \
  void __tsan_unaligned_write##n(void* at) { check((u64)at, n, true, false, false, 1, HERE); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  check((u64)from, u32(bytes), false, true, false, 1, HERE);
  check((u64)to, u32(bytes), true, false, false, 1, HERE);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) { return __tsan_memcpy(to, from, bytes); }
void* __tsan_memset(void* to, int value, size_t bytes) {
  check((u64)to, u32(bytes), true, false, false, 1, HERE);
  return memset(to, value, bytes);
}
void msim_atomic(void* at, u32 bytes) { check((u64)at, bytes, true, true, true, bytes, HERE); }

static void undefined(const char* what, u64 pc) {
  Report report{};
  report.name = what;
  fault(UNDEFINED, pc, report);
}
void __ubsan_handle_out_of_bounds(void*, u64) { undefined("an index outside of its array", HERE); }
void __ubsan_handle_divrem_overflow(void*, u64, u64) { undefined("a division by 0", HERE); }
void __ubsan_handle_shift_out_of_bounds(void*, u64, u64) { undefined("a shift by more bits than there are", HERE); }
#endif
}
