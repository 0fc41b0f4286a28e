// What our Metal kernels say, in CUDA: put before a kernel's text, after CUDA's own headers, it makes that text
// a CUDA kernel. A simdgroup is a warp, a threadgroup a block. The address spaces are gone by then, by ops/metal.py:
// CUDA spells its own words with them, so that no macro can take them away.

#define inline __device__ __inline__
#define UNROLL _Pragma("unroll")
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using bfloat = __nv_bfloat16;
using bfloat16_t = __nv_bfloat16;
using float16_t = __half;
static_assert(sizeof(ulong) == 8, "an index of a big buffer needs 64 bits");

namespace metal {

constexpr uint ALL = 0xffffffffu;  // every lane of a warp takes part

inline uint flat_thread() {
    return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
}

inline uint3 grid_thread() {
    return make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
        blockIdx.z * blockDim.z + threadIdx.z);
}

// The same order of sums as metalsim's and, as far as it is known, Apple's: halves, from 16 lanes apart to one.
template <typename V, typename F>
inline V simd_reduce(V value, F combine) {
    for (int apart = 16; apart > 0; apart /= 2) {
        value = combine(value, __shfl_xor_sync(ALL, value, apart));
    }
    return value;
}

template <typename V>
inline V simd_sum(V value) {
    return simd_reduce(value, [](V a, V b) { return a + b; });
}

template <typename V>
inline V simd_max(V value) {
    return simd_reduce(value, [](V a, V b) { return max(a, b); });
}

template <typename V>
inline V simd_min(V value) {
    return simd_reduce(value, [](V a, V b) { return min(a, b); });
}

template <typename V>
inline V simd_shuffle(V value, ushort lane) {
    return __shfl_sync(ALL, value, lane);
}

inline float simd_shuffle_xor(float value, ushort apart) {
    return __shfl_xor_sync(ALL, value, apart);
}

template <typename A, typename B>
inline A as_type(B value) {
    static_assert(sizeof(A) == sizeof(B), "as_type needs two types of one size");
    A same;
    memcpy(&same, &value, sizeof(A));
    return same;
}

// Two numbers under Metal's names; CUDA's own pair has no constructor.
struct pair {
    uint x, y;
    pair() = default;
    __device__ pair(uint first, uint second) : x(first), y(second) {}
};

// Numbers that are loaded together.
template <typename T, int N>
struct alignas(sizeof(T) * N) vec {
    T at[N];
    __device__ T& operator[](int i) { return at[i]; }
    __device__ T operator[](int i) const { return at[i]; }
};

namespace precise {

inline float exp(float x) { return ::expf(x); }
inline float log(float x) { return ::logf(x); }
inline float cos(float x) { return ::cosf(x); }
inline float sin(float x) { return ::sinf(x); }
inline float sqrt(float x) { return ::sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / ::sqrtf(x); }

}  // namespace precise
}  // namespace metal

enum class mem_flags { mem_none, mem_threadgroup, mem_device };

inline void threadgroup_barrier(mem_flags) {
    __syncthreads();
}

enum memory_order_of_metal { memory_order_relaxed };
using atomic_uint = uint;

inline uint atomic_fetch_add_explicit(uint* at, uint value, memory_order_of_metal) {
    return atomicAdd(at, value);
}

using metal::as_type;
using metal::vec;
using metal::simd_max;
using metal::simd_min;
using metal::simd_shuffle;
using metal::simd_shuffle_xor;
using metal::simd_sum;

#define thread_position_in_grid (::metal::grid_thread())
#define thread_position_in_threadgroup (threadIdx)
#define threadgroup_position_in_grid (blockIdx)
#define thread_index_in_threadgroup (::metal::flat_thread())
#define thread_index_in_simdgroup (::metal::flat_thread() % 32)
#define simdgroup_index_in_threadgroup (::metal::flat_thread() / 32)
#define uint2 ::metal::pair
#define uint4 ::metal::vec<uint, 4>
#define float4 ::metal::vec<float, 4>
