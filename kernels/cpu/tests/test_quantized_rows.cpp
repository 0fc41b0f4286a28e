#include "../pool.h"
#include "../quantized_rows.h"
#include "quantized.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

std::vector<float> multiply(const std::vector<float>& x, int64_t rows, const Quantized& w, int bits) {
    const Matrix& m = w.layout;
    std::vector<uint32_t> words(w.stream.size() / 4);
    std::memcpy(words.data(), w.stream.data(), w.stream.size());
    std::vector<float> out(rows * m.rows, -7.0f);
    quantized_rows({x.data(), words.data(), w.scale.data(), w.bias.data(), out.data(), rows, m.columns, m.rows,
                    m.group_size, bits});
    return out;
}

}  // namespace

TEST(quantized_rows_match_float64) {
    on_each_isa([] {
        for (int bits : {2, 4, 8})
            for (int group : {32, 64, 128})
                for (int64_t inputs : {group, 3 * group})
                    for (int64_t rows : {0, 1, 5}) {
                        const Quantized w(37, inputs, bits, group, true, 1);
                        const auto x = random_floats(rows * inputs, 5, -3, 3);
                        const auto y = multiply(x, rows, w, bits);
                        double most = 0, size = 1e-30;
                        for (int64_t r = 0; r < rows; ++r)
                            for (int64_t o = 0; o < 37; ++o) {
                                double sum = 0, sizes = 0;
                                for (int64_t i = 0; i < inputs; ++i) {
                                    sum += x[r * inputs + i] * w.weight(o, i);
                                    sizes += std::fabs(x[r * inputs + i] * w.weight(o, i));
                                }
                                most = std::fmax(most, std::fabs(y[r * 37 + o] - sum));
                                size = std::fmax(size, sizes);
                            }
                        CHECK(most / size < 1e-6, "%d bits, group %d, %d inputs: %g", bits, group, int(inputs), most / size);
                    }
    });
}

TEST(quantized_rows_give_each_row_the_bits_it_gets_alone) {
    const int threads = num_threads();
    on_each_isa([] {
        for (int bits : {2, 4, 8}) {
            const Quantized w(40, 384, bits, 64, true, 1);
            const auto x = random_floats(5 * 384, 3);
            set_num_threads(3);
            const auto all = multiply(x, 5, w, bits);
            set_num_threads(1);
            for (int r = 0; r < 5; ++r) {
                const auto one = multiply({x.begin() + r * 384, x.begin() + (r + 1) * 384}, 1, w, bits);
                CHECK(!std::memcmp(one.data(), &all[r * 40], 40 * sizeof(float)), "row %d, %d bits", r, bits);
            }
        }
    });
    set_num_threads(threads);
}
