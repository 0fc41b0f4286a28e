#include "../swiglu.h"
#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

TEST(swiglu_matches_float64) {
    on_each_isa([] {
        for (int64_t count : {0, 1, 15, 16, 17, 20011}) {
            const auto gate = random_floats(count, 1, -20, 20), up = random_floats(count, 2);
            std::vector<float> out(count);
            std::vector<double> expected(count);
            swiglu({gate.data(), up.data(), out.data(), count});
            for (int64_t i = 0; i < count; ++i)
                expected[i] = gate[i] / (1 + std::exp(-double(gate[i]))) * up[i];
            CHECK(off(out.data(), expected.data(), count) < 3e-7, "count %d", int(count));
        }
    });
}

TEST(swiglu_at_the_ends) {
    on_each_isa([] {
        const float gate[] = {INFINITY, 1000, -1000, 0, NAN}, up[] = {1, 1, 1, 1, 1};
        float out[5];
        swiglu({gate, up, out, 5});
        CHECK(out[0] == INFINITY && out[1] == 1000 && out[2] == 0 && out[3] == 0 && std::isnan(out[4]));
    });
}
