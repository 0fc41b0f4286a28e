// kernel_tests [part of a test's name]
#include <cstring>

#include "check.h"

namespace tiny_llm::test {
namespace {
int failures = 0;
}

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

void fail(const char* file, int line, const std::string& what) {
    ++failures;
    std::printf("%s:%d: [%s] %s\n", file, line, isa_name(isa()), what.c_str());
}

void on_each_isa(const std::function<void()>& body) {
    const std::string before = isa_name(isa());
    for (int i = 0; i < kIsas; ++i)
        if (set_isa(isa_name(Isa(i)))) body();
    set_isa(before.c_str());
}

std::vector<float> random_floats(size_t count, uint32_t seed, float low, float high) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<float> draw(low, high);
    std::vector<float> values(count);
    for (float& value : values) value = draw(generator);
    return values;
}

}  // namespace tiny_llm::test

int main(int argc, char** argv) {
    using namespace tiny_llm::test;
    int ran = 0;
    for (const Test& test : tests()) {
        if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
        std::printf("%s\n", test.name);
        std::fflush(stdout);
        test.run();
        ++ran;
    }
    std::printf("%d tests up to %s, %d failures\n", ran, isa_name(tiny_llm::best_isa()), failures);
    return failures || !ran ? 1 : 0;
}
