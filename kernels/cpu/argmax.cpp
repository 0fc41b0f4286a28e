#include "argmax.h"

#include "vocabulary.h"

namespace tiny_llm::TINY_ISA {

// Several rows go to a thread each; one row's chunks to all of them.
void argmax(const Argmax& a) {
    parallel_for(a.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* x = a.x + row * a.width;
            a.places[row] = place_of(x, a.width, largest_of(x, a.width));
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
