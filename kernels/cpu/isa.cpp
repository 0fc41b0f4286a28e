#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(TINY_X86_SETS)
#include <cpuid.h>
#endif
#if defined(TINY_ARM_SETS)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tiny_llm {
namespace {

#if defined(TINY_ARM_SETS)
constexpr const char* kNames[] = {"portable", "dotprod", "i8mm"};
constexpr const char* kAllNames = "portable, dotprod or i8mm";
#else
constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
constexpr const char* kAllNames = "portable, avx2, avx512, avx512bf16 or amx";
#endif

#if defined(TINY_X86_SETS)
// Not every compiler's __builtin_cpu_supports knows this one.
bool has_f16c() {
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}

// Of processors that have this, AMD's take two products a lane as fast as one by fma; Intel's are slower with it.
bool has_fast_bf16() {
    unsigned eax, ebx, ecx, edx;
    return __builtin_cpu_is("amd") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
}

// AMX needs the kernel's leave to use its tiles, once a process (Linux: arch_prctl, ARCH_REQ_XCOMP_PERM).
bool amx_granted() {
#if defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    const bool tile = edx & (1u << 24), int8 = edx & (1u << 25);
    return tile && int8 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif

Isa detect() {
#if defined(TINY_X86_SETS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (!avx2) return Isa::portable;
    if (!avx512) return Isa::avx2;
    return amx_granted() ? Isa::amx : has_fast_bf16() ? Isa::avx512bf16 : Isa::avx512;
#elif defined(TINY_ARM_SETS)
    if (!(getauxval(AT_HWCAP) & HWCAP_ASIMDDP)) return Isa::portable;
    return getauxval(AT_HWCAP2) & (1 << 13) ? Isa::i8mm : Isa::dotprod;  // HWCAP2_I8MM: Linux 5.7 named it
#else
    return Isa::portable;
#endif
}

int find(const char* name) {
    for (int i = 0; i < kIsas; ++i)
        if (std::strcmp(name, kNames[i]) == 0) return i;
    return -1;
}

Isa initial() {
    const char* wanted = std::getenv("TINY_LLM_CPU_ISA");
    if (!wanted || !*wanted) return best_isa();
    const int found = find(wanted);
    if (found < 0 || found > static_cast<int>(best_isa())) {
        std::fprintf(stderr,
                     "warning: TINY_LLM_CPU_ISA is '%s', expected %s, and one that this machine has; using %s.\n",
                     wanted, isa_names(), isa_name(best_isa()));
        return best_isa();
    }
    return static_cast<Isa>(found);
}

std::atomic<int>& current() {
    static std::atomic<int> value{static_cast<int>(initial())};
    return value;
}

}  // namespace

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

bool set_isa(const char* name) {
    const int found = find(name);
    if (found < 0 || found > static_cast<int>(best_isa())) return false;
    current().store(found);
    return true;
}

const char* isa_names() { return kAllNames; }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace tiny_llm
