// Which instruction sets there are, and which one the process uses. Owns the choice at run time.
//
// A kernel file is compiled once for each set, inside `namespace tiny_llm::TINY_ISA`. Such a file
// includes C headers and our own only: a C++ library template compiled for AVX-512 could be the one
// copy that the linker keeps for the whole process.
#pragma once

namespace tiny_llm {

// Whether this build holds more than the portable set; CMakeLists.txt says which builds do not.
#if defined(__x86_64__) && !defined(TINY_PORTABLE_ONLY)
#define TINY_X86_SETS
#elif defined(__aarch64__) && defined(__linux__)
#define TINY_ARM_SETS
#endif

#if defined(TINY_ARM_SETS)
enum class Isa { portable = 0, dotprod = 1, i8mm = 2 };
constexpr int kIsas = 3;
#else
enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };
constexpr int kIsas = 5;
#endif

// The best set that this machine has, or the lower one named by $TINY_LLM_CPU_ISA.
Isa isa();

// The best set that this machine has and this build holds.
Isa best_isa();

// Use another set from now on; false if this machine or build has not got it. Not while kernels run.
bool set_isa(const char* name);

const char* isa_name(Isa isa);
const char* isa_names();  // of all of this architecture, to be read by people

}  // namespace tiny_llm

// Declares `void name(const Args&)` for each instruction set and the function that picks one.
#if defined(TINY_X86_SETS)
#define TINY_KERNEL(name, Args)                                   \
    namespace portable { void name(const Args& args); }           \
    namespace avx2 { void name(const Args& args); }               \
    namespace avx512 { void name(const Args& args); }             \
    static inline void name(const Args& args) {                   \
        if (isa() >= Isa::avx512) return avx512::name(args);      \
        if (isa() == Isa::avx2) return avx2::name(args);          \
        portable::name(args);                                     \
    }
#else
#define TINY_KERNEL(name, Args)                                   \
    namespace portable { void name(const Args& args); }           \
    static inline void name(const Args& args) { portable::name(args); }
#endif
