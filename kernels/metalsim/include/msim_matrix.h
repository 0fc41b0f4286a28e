// 8x8 matrices spread over a simdgroup, two elements a lane, in the layout of Apple's GPUs.
#pragma once

struct msim_spot { uint row, column; };
MSIM_FUNC msim_spot msim_spot_of(uint lane) {
  uint quad = lane / 4;
  return {(quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2};
}
MSIM_FUNC uint msim_lane_of(uint row, uint column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + ((column >> 1) & 1);
}

template <typename T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "a simdgroup matrix is 8 x 8");
  vec<T, 2> held;
  MSIM_FUNC simdgroup_matrix() {}
  MSIM_FUNC explicit simdgroup_matrix(T diagonal) {
    msim_spot s = msim_spot_of(msim_lane());
    held = {s.row == s.column ? diagonal : T(0), s.row == s.column + 1 ? diagonal : T(0)};
  }
  MSIM_FUNC vec<T, 2>& thread_elements() { return held; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int R, int C> MSIM_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> m;
  m.held = vec<T, 2>{x, x};
  return m;
}
template <typename T, typename P>
MSIM_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, P from, ulong row_length = 8, ulong2 origin = 0, bool transposed = false) {
  msim_spot s = msim_spot_of(msim_lane());
  for (uint i = 0; i < 2; ++i) {
    ulong row = s.row, column = s.column + i;
    if (transposed) row = s.column + i, column = s.row;
    T x = from[(origin.y + row) * row_length + origin.x + column];
    m.held[i] = x;
  }
}
template <typename T, typename P>
MSIM_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> m, P to, ulong row_length = 8, ulong2 origin = 0, bool transposed = false) {
  msim_spot s = msim_spot_of(msim_lane());
  for (uint i = 0; i < 2; ++i) {
    ulong row = s.row, column = s.column + i;
    if (transposed) row = s.column + i, column = s.row;
    to[(origin.y + row) * row_length + origin.x + column] = m.held[i];
  }
}

struct msim_operands { float a[2], b[2]; };
// A chain of fma in order of k. Apple says neither the order nor where it rounds: a kernel whose bits must be those of
// another one has to ask the device.
MSIM_QUIET float2 msim_product(const Exchange* e, float2 c) {
  msim_spot s = msim_spot_of(msim_lane());
  for (uint k = 0; k < 8; ++k) {
    const msim_operands* left = (const msim_operands*)e->in[msim_lane_of(s.row, k)];
    const msim_operands* right = (const msim_operands*)e->in[msim_lane_of(k, s.column)];
    c[0] = __builtin_fmaf(left->a[k & 1], right->b[0], c[0]);
    c[1] = __builtin_fmaf(left->a[k & 1], right->b[1], c[1]);
  }
  return c;
}
template <typename A, typename B, typename D>
MSIM_SYNC void msim_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                             float2 c) {
  msim_operands mine = {{float(a.held[0]), float(a.held[1])}, {float(b.held[0]), float(b.held[1])}};
  c = msim_product(msim_give(OP_MATRIX, mine), c);
  d.held = vec<D, 2>{static_cast<D>(c[0]), static_cast<D>(c[1])};
}
template <typename A, typename B, typename C, typename D>
MSIM_SYNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                             simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  msim_multiply(d, a, b, float2{float(c.held[0]), float(c.held[1])});
}
template <typename A, typename B, typename D>
MSIM_SYNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
  msim_multiply(d, a, b, float2{0, 0});
}
