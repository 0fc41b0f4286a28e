// A few lines in place of a test framework: kernels alone, so that sanitizers and emulators can run them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../isa.h"

namespace tiny_llm::test {

// Where a processor is emulated, or each access watched for races: what elsewhere takes a second takes minutes.
#if defined(TINY_FEWER_CASES)
constexpr bool kFewerCases = true;
#else
constexpr bool kFewerCases = false;
#endif

struct Test {
    const char* name;
    void (*run)();
};
std::vector<Test>& tests();
struct Register {
    Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

// Counts and prints a failure; the run goes on and ends with exit code 1.
void fail(const char* file, int line, const std::string& what);

// Runs `body` once on each instruction set that this machine and build have.
void on_each_isa(const std::function<void()>& body);

std::vector<float> random_floats(size_t count, uint32_t seed, float low = -1, float high = 1);

// To nearest, ties to even.
inline float to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(&x, &bits, 4);
    return x;
}

// The largest difference, relative to the largest expected value (or 1 where all are 0).
template <class A, class B>
double off(const A* got, const B* expected, size_t count) {
    double most = 0, difference = 0;
    for (size_t i = 0; i < count; ++i) {
        most = std::fmax(most, std::fabs(double(expected[i])));
        const double d = std::fabs(double(got[i]) - double(expected[i]));
        difference = d > difference || std::isnan(d) ? d : difference;
    }
    return difference / (most > 0 ? most : 1);
}

}  // namespace tiny_llm::test

#define TEST(name)                                                              \
    static void name();                                                         \
    static ::tiny_llm::test::Register register_##name(#name, name);             \
    static void name()

#define CHECK(ok, ...)                                                          \
    do {                                                                        \
        if (!(ok)) {                                                            \
            char what_[512];                                                    \
            std::snprintf(what_, sizeof what_, "" __VA_ARGS__);                 \
            ::tiny_llm::test::fail(__FILE__, __LINE__, std::string(#ok "  ") + what_); \
        }                                                                       \
    } while (0)
