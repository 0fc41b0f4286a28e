// Small floats, rounded to nearest even: compilers call these where the processor has no such instruction.
#pragma once
#include "runtime.h"

extern "C" {
static u16 round_bits(u32 bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return u16(bits >> 16 | 0x40);
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__bf16 __truncsfbf2(float x) {
  u16 bits = round_bits(__builtin_bit_cast(u32, x));
  return __builtin_bit_cast(__bf16, bits);
}

__bf16 __truncdfbf2(double x) {
  float f = float(x);
  u32 bits = __builtin_bit_cast(u32, f);
  // Round to odd, so that rounding again rounds as once.
  if (double(f) != x && !(bits & 1)) bits = (double(f) > x) == (x > 0) ? bits - 1 : bits + 1;
  u16 rounded = round_bits(bits);
  return __builtin_bit_cast(__bf16, rounded);
}

float __extendhfsf2(_Float16 x) {
  u16 h = __builtin_bit_cast(u16, x);
  u32 sign = u32(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) bits = sign | (rest + (112 << 10)) << 13;
  else {
    float small = float(int(rest)) * 0x1p-24f;
    bits = sign | __builtin_bit_cast(u32, small);
  }
  return __builtin_bit_cast(float, bits);
}

_Float16 __truncsfhf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff, half;
  if (rest > 0x7f800000) half = 0x7e00;
  else if (rest >= 0x477ff000) half = 0x7c00;
  else if (rest < 0x38800000) {
    float sum = __builtin_bit_cast(float, rest) + 0.5f;  // the sum's last bit is half's smallest number
    half = __builtin_bit_cast(u32, sum) - 0x3f000000;
  } else half = (rest + 0xfff + (rest >> 13 & 1) - (112 << 23)) >> 13;
  u16 result = u16(sign | half);
  return __builtin_bit_cast(_Float16, result);
}

_Float16 __truncdfhf2(double x) {
  float f = float(x);
  u32 bits = __builtin_bit_cast(u32, f);
  if (double(f) != x && !(bits & 1)) bits = (double(f) > x) == (x > 0) ? bits - 1 : bits + 1;
  return __truncsfhf2(__builtin_bit_cast(float, bits));
}
}
