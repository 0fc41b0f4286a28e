// Random numbers that any thread can make alone: mx.random's, element by element. Kernel files only.
//
// Threefry-2x32 of 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2)
// turns a key and a count of two words into two random words. MLX fills an array of n words by pairs:
// words i and i + ceil(n / 2) come from the count of these two numbers, and the middle one of an odd n from (i, 0).
#pragma once

#include <math.h>

#include "simd.h"

namespace tiny_llm::TINY_ISA {

template <class U>
struct Words {
    U first, second;
};
typedef Words<uint32_t> Key;

// U is uint32_t or a vector of them.
template <class U>
static inline Words<U> threefry(Key key, Words<U> x) {
    constexpr int kTurns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const uint32_t keys[3] = {key.first, key.second, key.first ^ key.second ^ 0x1BD11BDA};
    x.first += keys[0];
    x.second += keys[1];
    for (int i = 0; i < 5; ++i) {
        for (int j = 0; j < 4; ++j) {
            const int turn = kTurns[i % 2][j];
            x.first += x.second;
            x.second = ((x.second << turn) | (x.second >> (32 - turn))) ^ x.first;
        }
        x.first += keys[(i + 1) % 3];
        x.second += keys[(i + 2) % 3] + i + 1;
    }
    return x;
}

// The key of a draw: the first half of the seed's key when that is split in two, exclusive-or the position.
static inline Key key_of(uint64_t seed, uint64_t position) {
    const Key whole{(uint32_t)(seed >> 32), (uint32_t)seed};
    const uint32_t first = threefry<uint32_t>(whole, {0, 2}).first, second = threefry<uint32_t>(whole, {1, 3}).first;
    return {first ^ (uint32_t)(position >> 32), second ^ (uint32_t)position};
}

// Words begin ... begin + kWidth - 1 of an array of n.
static inline vu random_words(Key key, int64_t begin, int64_t n) {
    vu place;
    for (int lane = 0; lane < kWidth; ++lane) place[lane] = lane;
    place += (uint32_t)begin;
    const uint32_t half = (uint32_t)(n / 2), step = half + n % 2;
    const vu low = (vu)(place < half), middle = (vu)(place == half) & (n % 2 ? ~0u : 0u);
    const vu other = (low & (place + step)) | (~low & (place - step));
    const vu less = (low & place) | (~low & other), more = (low & other) | (~low & place);
    const Words<vu> words = threefry<vu>(key, {(~middle & less) | (middle & place), ~middle & more});
    const vu first = low | middle;
    return (first & words.first) | (~first & words.second);
}

// From 0 to just below 1, each word times 2^-32 to nearest; halves make the conversion exact until the sum.
static inline vf uniform(vu words) {
    const vf high = __builtin_convertvector((vi)(words >> 16), vf), low = __builtin_convertvector((vi)(words & 0xffff), vf);
    return min((high * 65536.0f + low) * 0x1p-32f, splat(0x1.fffffep-1f));
}

// A word of 0 would be -infinity, with which no token could win; every other is above -3.2.
constexpr float kLeastNoise = -4.0f, kMostNoise = 16.7f;

// -log(-log u) to kNoiseError: as MLX computes it, and, within kNoiseError, faster.
static inline float gumbel(float u) { return fmaxf(-logf(-logf(u)), kLeastNoise); }
static inline vf gumbel_nearly(vf u) { return max(-log(-log(max(u, splat(1e-24f)))), splat(kLeastNoise)); }
constexpr float kNoiseError = 5e-5f;

}  // namespace tiny_llm::TINY_ISA
