// Looks at every access of memory, with the state of runtime.cpp, which includes this in strict mode.
// Compilers call it by the names of the thread sanitizer, and of the one for undefined behaviour.
#pragma once

namespace {
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
  u64 size;
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
  b.read += bytes, ++b.loads;
  for (u64 i = offset / b.element; i <= (offset + bytes - 1) / b.element; ++i)
    if (by[i] != group_number + 1) by[i] = group_number + 1, b.fetched += b.element;
}

void check(u64 at, u32 bytes, bool write, bool read, bool atomic, u32 alignment, u64 pc) {
  if (at - (u64)stacks < STACK * MAX_THREADS) return;
  tick(1, pc);
  Place p{};
  Buffer* buffer = nullptr;
  bool owned = true;
  u64 inside = at - (u64)memory;
  if (inside < sizeof(memory)) {
    u32 number = owner[inside];  // or the nearest array that begins before
    owned = number;
    for (u32 i = 0; !owned && i < array_count; ++i)
      if (arrays[i].offset <= inside) number = i + 1;
    const Array& a = arrays[number ? number - 1 : 0];
    p = {a.cells, s64(inside) - a.offset, a.bytes, a.element, 0, -1, a.name, false};
  } else {
    u64 slot = (at - (u64)arena) / RESERVED;
    if (at < (u64)arena || slot >= launch->buffers) {
      if (at - (u64)launch->image < launch->image_bytes) return;
      if (at - (u64)fibers < sizeof(fibers)) return;
      Report what{};
      what.here.write = write, what.offset = s64(at), what.bytes = bytes;
      return fault(WILD, pc, what);
    }
    buffer = &launch->buffer[slot];
    s64 offset = s64(at - (u64)arena - slot * RESERVED) - s64(MARGIN);
    p = {buffer_cells[slot], offset, buffer->bytes, buffer->element, 1, s32(slot), nullptr, buffer->role != OUTPUT};
  }
  if (!owned || p.offset < 0 || u64(p.offset) + bytes > p.size) {
    Report what = about(p, p.offset, bytes, write);
    what.size = p.size;
    return fault(BOUNDS, pc, what);
  }
  if (buffer) {
    if (write && buffer->role == INPUT) return fault(INPUT_WRITTEN, pc, about(p, p.offset, bytes, write));
    if (read) count_read(*buffer, fetched_by[p.buffer], u64(p.offset), bytes);
    if (write) buffer->written += bytes;
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
}  // namespace

extern "C" {
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
void msim_atomic(void* at, u32 bytes, bool write, bool read) {
  check((u64)at, bytes, write, read, true, bytes, HERE);
}

static void undefined(const char* what, u64 pc) {
  Report report{};
  report.name = what;
  fault(UNDEFINED, pc, report);
}
void __ubsan_handle_out_of_bounds(void*, u64) { undefined("an index outside of its array", HERE); }
void __ubsan_handle_divrem_overflow(void*, u64, u64) { undefined("a division by 0", HERE); }
void __ubsan_handle_shift_out_of_bounds(void*, u64, u64) { undefined("a shift by more bits than there are", HERE); }
}
