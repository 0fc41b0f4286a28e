#include "../isa.h"

#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

TEST(isa_can_be_lowered_and_not_raised) {
    const std::string before = isa_name(isa());
    for (int i = 0; i < kIsas; ++i) {
        const bool there = i <= static_cast<int>(best_isa());
        CHECK(set_isa(isa_name(Isa(i))) == there, "%s", isa_name(Isa(i)));
        CHECK(!there || isa() == Isa(i), "%s", isa_name(Isa(i)));
    }
    CHECK(set_isa(before.c_str()));
    for (const char* unknown : {"", "AVX2", "sse9"}) CHECK(!set_isa(unknown), "%s", unknown);
    CHECK(before == isa_name(isa()), "an unknown name changed it to %s", isa_name(isa()));
}
