// Atomics. Only one thread runs at a time here, so a plain operation is one; the checker is told that it is atomic.
#pragma once

enum memory_order { memory_order_relaxed };
template <typename T> struct _atomic { T value; };
template <typename T> using atomic = _atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

#ifdef MSIM_STRICT
#define MSIM_TELL(at, write, read) msim_atomic((void*)(at), sizeof(*(at)), write, read)
#else
#define MSIM_TELL(at, write, read)
#endif
template <typename P> using msim_value = remove_cv_t<remove_reference_t<decltype(static_cast<P>(nullptr)->value)>>;

template <typename P> MSIM_QUIET msim_value<P> msim_peek(P at) { return at->value; }
template <typename P> MSIM_QUIET void msim_poke(P at, msim_value<P> x) { at->value = x; }

template <typename P> MSIM_FUNC msim_value<P> atomic_load_explicit(P at, memory_order) {
  MSIM_TELL(at, false, true);
  return msim_peek(at);
}
template <typename P, typename V> MSIM_FUNC void atomic_store_explicit(P at, V x, memory_order) {
  MSIM_TELL(at, true, false);
  msim_poke(at, static_cast<msim_value<P>>(x));
}
#define MSIM_FETCH(name, expression)                                                                         \
  template <typename P, typename V>                                                                          \
  MSIM_FUNC msim_value<P> atomic_##name##_explicit(P at, V given, memory_order) {                            \
    MSIM_TELL(at, true, true);                                                                               \
    msim_value<P> old = msim_peek(at), x = static_cast<msim_value<P>>(given);                                \
    msim_poke(at, static_cast<msim_value<P>>(expression));                                                   \
    return old;                                                                                              \
  }
MSIM_FETCH(exchange, x)
MSIM_FETCH(fetch_add, old + x)
MSIM_FETCH(fetch_sub, old - x)
MSIM_FETCH(fetch_min, x < old ? x : old)
MSIM_FETCH(fetch_max, old < x ? x : old)
MSIM_FETCH(fetch_and, old & x)
MSIM_FETCH(fetch_or, old | x)
MSIM_FETCH(fetch_xor, old ^ x)
template <typename P, typename E, typename V>
MSIM_FUNC bool atomic_compare_exchange_weak_explicit(P at, E expected, V wanted, memory_order, memory_order) {
  MSIM_TELL(at, true, true);
  msim_value<P> old = msim_peek(at);
  bool same = old == *expected;
  if (same) msim_poke(at, static_cast<msim_value<P>>(wanted));
  else *expected = old;
  return same;
}
