// Operations across the 32 lanes of a simdgroup, and across the 4 of a quadgroup; barriers.
#pragma once

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSIM_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
MSIM_FUNC constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }
MSIM_SYNC void threadgroup_barrier(mem_flags flags) { msim_barrier(uint(flags)); }
MSIM_SYNC void simdgroup_barrier(mem_flags flags) { msim_collective(OP_BARRIER, nullptr, 0, uint(flags)); }

template <typename T> MSIM_SYNC Exchange* msim_give(uint op, T x) {
  static_assert(sizeof(T) <= 64, "too wide for a simdgroup operation");
  return msim_collective(op, &x, sizeof(T), 0);
}
template <typename T> MSIM_QUIET T msim_take(const Exchange* e, uint lane) {
  T x;
  __builtin_memcpy(&x, e->in[lane], sizeof(T));
  return x;
}
MSIM_QUIET uint msim_lane() { return msim_me()->thread_index_in_simdgroup; }
MSIM_QUIET bool msim_active(const Exchange* e, uint lane) { return e->active >> lane & 1; }
MSIM_QUIET uint msim_first(const Exchange* e) { return uint(__builtin_ctz(e->active)); }

// A lane that takes no part has nothing to give: its reader gets its own value back.
template <typename T> MSIM_SYNC T msim_from(T x, uint lane) {
  Exchange* e = msim_give(OP_SHUFFLE, x);
  return lane < 32 && msim_active(e, lane) ? msim_take<T>(e, lane) : x;
}
template <typename T> MSIM_SYNC T simd_shuffle(T x, ushort lane) { return msim_from(x, lane); }
template <typename T> MSIM_SYNC T simd_broadcast(T x, ushort lane) { return msim_from(x, lane); }
template <typename T> MSIM_SYNC T simd_broadcast_first(T x) {
  Exchange* e = msim_give(OP_SHUFFLE, x);
  return msim_take<T>(e, msim_first(e));
}
template <typename T> MSIM_SYNC T simd_shuffle_xor(T x, ushort mask) { return msim_from(x, msim_lane() ^ mask); }
template <typename T> MSIM_SYNC T simd_shuffle_down(T x, ushort by) { return msim_from(x, msim_lane() + by); }
template <typename T> MSIM_SYNC T simd_shuffle_up(T x, ushort by) { return msim_from(x, msim_lane() - by); }
template <typename T> MSIM_SYNC T simd_shuffle_rotate_down(T x, ushort by) { return msim_from(x, (msim_lane() + by) % 32); }
template <typename T> MSIM_SYNC T simd_shuffle_rotate_up(T x, ushort by) { return msim_from(x, (msim_lane() - by) % 32); }
template <typename T> MSIM_SYNC T simd_shuffle_and_fill_down(T x, T fill, ushort by, ushort modulo = 32) {
  uint lane = msim_lane(), at = lane % modulo + by, group = lane - lane % modulo;
  struct Both { T x, fill; };
  Exchange* e = msim_give(OP_SHUFFLE, Both{x, fill});
  return at < modulo ? msim_take<Both>(e, group + at).x : msim_take<Both>(e, group + at % modulo).fill;
}
template <typename T> MSIM_SYNC T simd_shuffle_and_fill_up(T x, T fill, ushort by, ushort modulo = 32) {
  uint lane = msim_lane(), at = lane % modulo, group = lane - at;
  struct Both { T x, fill; };
  Exchange* e = msim_give(OP_SHUFFLE, Both{x, fill});
  return at >= by ? msim_take<Both>(e, lane - by).x : msim_take<Both>(e, group + (modulo + at - by) % modulo).fill;
}

// The order of a butterfly that goes by neighbours first: ((0+1)+(2+3))+..., as Apple's GPUs have it.
template <typename T, typename F> MSIM_QUIET T msim_tree(const Exchange* e, F f, uint first, uint lanes) {
  T msim_values[32];
  bool msim_there[32];
  for (uint i = 0; i < lanes; ++i) {
    msim_there[i] = msim_active(e, first + i);
    if (msim_there[i]) msim_values[i] = msim_take<T>(e, first + i);
  }
  for (uint width = 1; width < lanes; width *= 2)
    for (uint i = 0; i + width < lanes; i += 2 * width) {
      if (msim_there[i] && msim_there[i + width]) msim_values[i] = f(msim_values[i], msim_values[i + width]);
      else if (msim_there[i + width]) msim_values[i] = msim_values[i + width], msim_there[i] = true;
    }
  return msim_values[0];
}
template <typename T, typename F> MSIM_SYNC T msim_reduce(T x, F f) {
  return msim_tree<T>(msim_give(OP_REDUCE, x), f, 0, 32);
}
template <typename T, typename F> MSIM_SYNC T msim_quad_reduce(T x, F f) {
  return msim_tree<T>(msim_give(OP_REDUCE, x), f, msim_lane() & ~3u, 4);
}
#define MSIM_REDUCE(name, expression)                                                                          \
  template <typename T> MSIM_SYNC T simd_##name(T x) { return msim_reduce(x, [](T a, T b) { return T(expression); }); } \
  template <typename T> MSIM_SYNC T quad_##name(T x) { return msim_quad_reduce(x, [](T a, T b) { return T(expression); }); }
MSIM_REDUCE(sum, a + b)
MSIM_REDUCE(product, a * b)
MSIM_REDUCE(max, max(a, b))
MSIM_REDUCE(min, min(a, b))
MSIM_REDUCE(and, a & b)
MSIM_REDUCE(or, a | b)
MSIM_REDUCE(xor, a ^ b)

template <bool with_own, typename T, typename F> MSIM_QUIET T msim_upto(const Exchange* e, T r, F f) {
  for (uint i = 0, end = msim_lane() + with_own; i < end; ++i)
    if (msim_active(e, i)) r = f(r, msim_take<T>(e, i));
  return r;
}
template <bool with_own, typename T, typename F> MSIM_SYNC T msim_scan(T x, T start, F f) {
  return msim_upto<with_own>(msim_give(OP_SCAN, x), start, f);
}
template <typename T> MSIM_SYNC T simd_prefix_inclusive_sum(T x) { return msim_scan<true>(x, T(0), [](T a, T b) { return T(a + b); }); }
template <typename T> MSIM_SYNC T simd_prefix_exclusive_sum(T x) { return msim_scan<false>(x, T(0), [](T a, T b) { return T(a + b); }); }
template <typename T> MSIM_SYNC T simd_prefix_inclusive_product(T x) { return msim_scan<true>(x, T(1), [](T a, T b) { return T(a * b); }); }
template <typename T> MSIM_SYNC T simd_prefix_exclusive_product(T x) { return msim_scan<false>(x, T(1), [](T a, T b) { return T(a * b); }); }

struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
  bool all() const { return bits == 0xffffffff; }
  bool any() const { return bits != 0; }
};
MSIM_QUIET ulong msim_count(const Exchange* e) {
  ulong r = 0;
  for (uint i = 0; i < 32; ++i)
    if (msim_active(e, i) && msim_take<bool>(e, i)) r |= 1ul << i;
  return r;
}
MSIM_SYNC ulong msim_ballot(bool x) { return msim_count(msim_give(OP_VOTE, x)); }
MSIM_SYNC simd_vote simd_ballot(bool x) { return {msim_ballot(x)}; }
MSIM_SYNC simd_vote simd_active_threads_mask() { return {msim_ballot(true)}; }
MSIM_SYNC bool simd_any(bool x) { return msim_ballot(x) != 0; }
MSIM_SYNC bool simd_all(bool x) { return msim_ballot(!x) == 0; }
MSIM_SYNC bool simd_is_first() { return uint(__builtin_ctzl(msim_ballot(true))) == msim_lane(); }

template <typename T> MSIM_SYNC T quad_shuffle(T x, ushort lane) { return msim_from(x, (msim_lane() & ~3u) + lane); }
template <typename T> MSIM_SYNC T quad_broadcast(T x, ushort lane) { return msim_from(x, (msim_lane() & ~3u) + lane); }
template <typename T> MSIM_SYNC T quad_shuffle_xor(T x, ushort mask) { return msim_from(x, msim_lane() ^ (mask & 3)); }
template <typename T> MSIM_SYNC T quad_shuffle_down(T x, ushort by) {
  uint lane = msim_lane();
  return msim_from(x, (lane & 3) + by < 4 ? lane + by : lane);
}
template <typename T> MSIM_SYNC T quad_shuffle_up(T x, ushort by) {
  uint lane = msim_lane();
  return msim_from(x, (lane & 3) >= by ? lane - by : lane);
}
