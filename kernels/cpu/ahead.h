// Weights that are asked for before their turn. Kernel files only.
#pragma once

namespace tiny_llm::TINY_ISA {

// Asks for a line of weights 4 KB before its turn, into the second-level cache: what processors do by themselves is not
// enough (Zen 1, one thread: one row's 278 MB in 26 ms, not 40; two rows 42, not 55). Except Zen 4 and what follows
// it, which read for few rows faster when left alone: one thread 10.2 ms, not 11.7; two rows 10.9, not 13.3.
template <int R>
[[gnu::always_inline]] inline void ask_ahead(const void* line) {
    constexpr int kAhead = 4096;
#if defined(__AVX512BF16__)
    if (R < 4) return;
#endif
    __builtin_prefetch((const char*)line + kAhead, 0, 2);
}

}  // namespace tiny_llm::TINY_ISA
