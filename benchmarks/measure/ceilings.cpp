// What this machine's cores and memory can do: read bandwidth, float32 multiply-adds, int8 dot products (by AMX, if
// there is AMX).
//
// ceilings.py compiles it for the machine at hand and asks, a line a question, "read 2", "fma 2" or "int8 2":
// what to measure and on how many threads. The answer is a line with units a second, or 0 for what this
// processor has no instruction for. A multiply and an add count as two.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));

constexpr size_t kReadBytes = size_t{1} << 30;  // far more than any cache holds
constexpr int kChains = 12;  // independent sums: more than latency times throughput, fewer than registers
constexpr int64_t kSteps = 10'000'000;

template <class T>
void keep(const T& value) {
    asm volatile("" : : "r"(&value) : "memory");
}

// Their sum, in a register: an array whose address is asked for would be stored at every step.
template <class T, int N>
T total(const T (&sums)[N]) {
    T all = sums[0];
    for (int i = 1; i < N; ++i) all = all + sums[i];
    return all;
}

// The compiler may not know what a register holds after this.
template <class T>
void hide(T& value) {
#if defined(__x86_64__)
    asm volatile("" : "+v"(value));
#elif defined(__ARM_NEON)
    asm volatile("" : "+w"(value));
#else
    asm volatile("" : "+m"(value));
#endif
}

// Runs body(thread) on so many threads and returns seconds.
template <class Body>
double seconds_of(int threads, const Body& body) {
    auto began = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(body, i);
    body(0);
    for (auto& other : others) other.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

const char* memory() {
    static char* base = [] {
        size_t page = size_t{1} << 21;
        char* bytes = static_cast<char*>(std::aligned_alloc(page, kReadBytes));
        if (!bytes) std::exit(1);
#if defined(__linux__)
        madvise(bytes, kReadBytes, MADV_HUGEPAGE);
#endif
        std::memset(bytes, 1, kReadBytes);
        return bytes;
    }();
    return base;
}

double read_rate(int threads) {
    const char* base = memory();
    size_t share = kReadBytes / threads / 4096 * 4096;
    double seconds = seconds_of(threads, [=](int thread) {
        const char* from = base + share * thread;
        Longs sums[8] = {};
        for (size_t i = 0; i + 8 * kVectorBytes <= share; i += 8 * kVectorBytes)
            for (int j = 0; j < 8; ++j) sums[j] += *reinterpret_cast<const Longs*>(from + i + j * kVectorBytes);
        keep(total(sums));
    });
    return double(share) * threads / seconds;
}

double fma_rate(int threads) {
    double seconds = seconds_of(threads, [](int) {
        Floats sums[kChains], factor = Floats{} + 0.999f, term = Floats{} + 0.5f;
        for (auto& sum : sums) hide(sum = Floats{});  // known to be alike, they would be one sum
        for (int64_t step = 0; step < kSteps; ++step)
            for (auto& sum : sums) sum = sum * factor + term;
        keep(total(sums));
    });
    return 2.0 * kSteps * kChains * (kVectorBytes / sizeof(float)) * threads / seconds;
}

#if defined(__AVX512VNNI__)
typedef __m512i Dots;
inline Dots dot(Dots sum, Dots a, Dots b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
typedef __m256i Dots;
inline Dots dot(Dots sum, Dots a, Dots b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX2__)
typedef __m256i Dots;
// Added up in 16 bits, as weights of 4 bits allow.
inline Dots dot(Dots sum, Dots a, Dots b) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); }
#elif defined(__ARM_FEATURE_MATMUL_INT8)
typedef int32x4_t Dots;
inline Dots dot(Dots sum, Dots a, Dots b) {
    return vusmmlaq_s32(sum, vreinterpretq_u8_s32(a), vreinterpretq_s8_s32(b));
}
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t Dots;
inline Dots dot(Dots sum, Dots a, Dots b) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#else
#define NO_DOTS
#endif

double int8_rate(int threads) {
#if defined(__AMX_INT8__) && defined(__linux__)
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0;  // Linux's leave to use tiles
    double seconds = seconds_of(threads, [](int) {
        struct alignas(64) {
            uint8_t palette = 1, reserved[15] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
        } shapes;
        asm volatile("ldtilecfg %0" : : "m"(shapes));
        for (int64_t step = 0; step < kSteps; ++step)
            asm volatile(
                "tdpbsud %tmm5, %tmm4, %tmm0\n\ttdpbsud %tmm5, %tmm4, %tmm1\n\t"
                "tdpbsud %tmm5, %tmm4, %tmm2\n\ttdpbsud %tmm5, %tmm4, %tmm3");
        asm volatile("tilerelease");
    });
    return 2.0 * kSteps * 4 * (16 * 16 * 64) * threads / seconds;
#elif defined(NO_DOTS)
    return 0.0 * threads;
#else
    double seconds = seconds_of(threads, [](int) {
        Dots sums[kChains], a = {}, b = {};
        hide(b);
        for (auto& sum : sums) hide(sum = Dots{});  // known to be alike, they would be one sum
        for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
            for (int i = 0; i < kChains; ++i) {
                Dots sum = dot(sums[i], a, b);  // asked of the array, they would not stay in registers
                hide(sum);
                hide(a);  // or the products would be made once, for all sums
                sums[i] = sum;
            }
        }
        keep(total(sums));
    });
#if defined(__ARM_FEATURE_MATMUL_INT8)
    constexpr int kProducts = 32;  // two outputs by two rows, 8 inputs each
#else
    constexpr int kProducts = sizeof(Dots);
#endif
    return 2.0 * kSteps * kChains * kProducts * threads / seconds;
#endif
}

}  // namespace

int main() {
    char what[8];
    int threads;
    while (std::scanf("%7s %d", what, &threads) == 2) {
        double rate = -1;
        if (threads < 1) return 2;
        if (!std::strcmp(what, "read")) rate = read_rate(threads);
        if (!std::strcmp(what, "fma")) rate = fma_rate(threads);
        if (!std::strcmp(what, "int8")) rate = int8_rate(threads);
        if (rate < 0) return 2;
        std::printf("%.6g\n", rate);
        std::fflush(stdout);
    }
}
