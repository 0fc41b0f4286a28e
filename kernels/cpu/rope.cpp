#include "rope.h"

#include "norm.h"
#include "pool.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int kScratchSlot = 0;

// Half as many numbers as a vf has, in float64: angles grow to 10^5 and more, and keep float32's accuracy.
constexpr int kLanes = kWidth / 2;
typedef double vd __attribute__((vector_size(8 * kLanes)));
typedef int64_t vl __attribute__((vector_size(8 * kLanes)));
typedef float Angles __attribute__((vector_size(4 * kLanes)));

void store_negated_where(float* to, vd x, vl mask) {
    const vd signed_x = (vd)((vl)x ^ (mask & INT64_MIN));
    const Angles narrow = __builtin_convertvector(signed_x, Angles);
    memcpy(to, &narrow, sizeof narrow);
}

// angle = n pi/2 + r with |r| <= pi/4, then minimax polynomials in r^2, 1e-11 off. Beyond 10^6 radians, where
// n * pi/2 is no longer exact, it is 2^-50 of the angle off.
void sin_cos(Angles angles, float* sines, float* cosines) {
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves an integer in the low bits
    const vd angle = __builtin_convertvector(angles, vd);
    const vd shifted = angle * 0.63661977236758134 + kRound;
    const vd n = shifted - kRound;
    const vd r = angle - n * 1.57079632673412561417 - n * 6.07710050650619224932e-11;  // 33 bits; the rest
    const vd z = r * r;
    const vd s = ((2.7183042038458217e-06 * z - 1.9839334080419202e-4) * z + 8.33332938357413e-3) * z;
    const vd c = ((-2.7210164908435364e-07 * z + 2.479951913243207e-5) * z - 1.3888883750107427e-3) * z;
    const vd sine = r + r * z * (s - 0.16666666641606923);
    const vd cosine = 1.0 - 0.5 * z + z * z * (c + 4.1666666622789846e-2);
    const vl quarter = (vl)shifted, odd = -(quarter & 1);
    const vd first = (vd)((odd & (vl)cosine) | (~odd & (vl)sine));
    const vd second = (vd)((odd & (vl)sine) | (~odd & (vl)cosine));
    store_negated_where(sines, first, -((quarter >> 1) & 1));
    store_negated_where(cosines, second, -(((quarter + 1) >> 1) & 1));
}

// begin 2.7 sines_and_cosines
// Of position * inv_freq, a float32 product as in the formula. sines and cosines have room for kWidth more.
void sines_and_cosines(int32_t position, const float* inv_freq, int64_t count, float* sines, float* cosines) {
    for (int64_t i = 0; i < count; i += kLanes) {
        Angles frequencies = {};
        memcpy(&frequencies, inv_freq + i, (count - i < kLanes ? count - i : kLanes) * sizeof(float));
        sin_cos((float)position * frequencies, sines + i, cosines + i);
    }
}
// end 2.7

// begin 2.7 turn
// Turns the pairs (x[i], x[i + half]); out may be x.
void turn(const float* x, const float* sines, const float* cosines, int64_t half, float* out) {
    int64_t i = 0;
    for (; i + kWidth <= half; i += kWidth) {
        const vf a = load(x + i), b = load(x + half + i), s = load(sines + i), c = load(cosines + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        out[i] = a * cosines[i] - b * sines[i];
        out[half + i] = b * cosines[i] + a * sines[i];
    }
}
// end 2.7

// begin 2.7 turn_token
// All heads of a token, normed if there is a norm, then turned: its angles are made once.
void turn_token(const Rope& a, int64_t token, float* sines, float* cosines) {
    sines_and_cosines(a.positions[token], a.inv_freq, a.dim / 2, sines, cosines);
    for (const Heads& part : a.parts)
        for (int64_t head = token * part.heads; head < (token + 1) * part.heads; ++head) {
            const float* x = part.x + head * a.dim;
            float* out = part.out + head * a.dim;
            if (part.norm) norm_row(x, part.norm, a.eps, a.dim, out);
            turn(part.norm ? out : x, sines, cosines, a.dim / 2, out);
        }
}
// end 2.7

}  // namespace

void rope(const Rope& a) {
    const int64_t width = (a.parts[0].heads + a.parts[1].heads) * a.dim, room = a.dim / 2 + kWidth;
    parallel_for(a.tokens, 1 + 8192 / (width + 1), [&](int64_t begin, int64_t end) {
        float* sines = static_cast<float*>(scratch(kScratchSlot, 2 * room * sizeof(float)));
        for (int64_t token = begin; token < end; ++token) turn_token(a, token, sines, sines + room);
    });
}

}  // namespace tiny_llm::TINY_ISA
