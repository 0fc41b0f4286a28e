#include "quantized_rows.h"

#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {
namespace {

// Eight lanes on any machine: where registers are narrower, the compiler takes two.
typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint32_t uints __attribute__((vector_size(32)));

inline floats load8(const float* p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline floats to_floats(uints v) { return __builtin_convertvector((ints)v, floats); }

// a * b + c in each lane
inline floats fma8(floats a, floats b, floats c) {
#if defined(__AVX2__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline float sum8(floats v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// The weights of one output.
struct Row {
    const uint32_t* words;  // group * bits / 32 a group
    const float* scales;    // one a group
    const float* biases;    // one a group
    int64_t groups;
    int group;  // weights of a group: 32, 64 or 128
    int bits;   // of a weight: 2, 4 or 8
};

// begin 2.3 dot_scalar
// One output for one row x: the sum over all inputs of (scale * q + bias) * x.
//   x [groups * group], sums [groups]: what the x of each group add up to
float dot_scalar(const Row& row, const float* x, const float* sums) {
    const int in_word = 32 / row.bits;
    const uint32_t mask = (1u << row.bits) - 1;
    const uint32_t* words = row.words;
    float y = 0;
    for (int64_t g = 0; g < row.groups; ++g) {
        float dot = 0;
        for (int k = 0; k < row.group; k += in_word, ++words)
            for (int i = 0; i < in_word; ++i) {
                const uint32_t q = *words >> (row.bits * i) & mask;
                dot += float(q) * x[g * row.group + k + i];
            }
        y += row.scales[g] * dot + row.biases[g] * sums[g];
    }
    return y;
}
// end 2.3

// begin 2.3 dot_vector
// The same for 4 bits a weight, a word at a time: lane i holds its weight i. Lanes are added up once, at the end.
float dot_vector(const Row& row, const float* x, const float* sums) {
    const uints shifts = {0, 4, 8, 12, 16, 20, 24, 28};
    const uint32_t* words = row.words;
    floats total = {};
    float y = 0;
    for (int64_t g = 0; g < row.groups; ++g) {
        floats dot = {};
        for (int k = 0; k < row.group; k += 8, ++words, x += 8) {
            const uints q = (uints{} + *words) >> shifts & 15;
            dot = fma8(to_floats(q), load8(x), dot);
        }
        total = fma8(dot, floats{} + row.scales[g], total);
        y += row.biases[g] * sums[g];
    }
    return y + sum8(total);
}
// end 2.3

// What the x of each group add up to: [rows, inputs / group].
const float* group_sums(const QuantizedRows& a) {
    const int64_t count = a.rows * a.inputs / a.group;
    float* sums = static_cast<float*>(scratch(0, count * sizeof(float)));
    for (int64_t g = 0; g < count; ++g) {
        floats sum = {};
        for (int k = 0; k < a.group; k += 8) sum += load8(a.x + g * a.group + k);
        sums[g] = sum8(sum);
    }
    return sums;
}

}  // namespace

void quantized_rows(const QuantizedRows& a) {
    constexpr int64_t kStep = 64 * 1024;  // multiply-adds that a thread takes at a time
    const int64_t groups = a.inputs / a.group, width = a.inputs * a.bits / 32;
    const float* sums = group_sums(a);
    parallel_for(a.outputs, 1 + kStep / (a.inputs * a.rows + 1), [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o) {
            const Row row{a.words + o * width, a.scales + o * groups, a.biases + o * groups, groups, a.group, a.bits};
            for (int64_t t = 0; t < a.rows; ++t) {
                const float *x = a.x + t * a.inputs, *of_groups = sums + t * groups;
                a.out[t * a.outputs + o] = a.bits == 4 ? dot_vector(row, x, of_groups) : dot_scalar(row, x, of_groups);
            }
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
