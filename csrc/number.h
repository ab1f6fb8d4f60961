// The three number formats of tensors, and their conversions to and from float: without branches, so that a
// compiler turns a loop of them into vector instructions.
#pragma once

#include "platform.h"

namespace blip2_kernels {

// Scalars, not structs around one: a compiler that copies a struct may not vectorise the loop.
enum class Half : uint16_t {};
enum class BFloat16 : uint16_t {};

HOST_DEVICE float to_float(float value) { return value; }

HOST_DEVICE float to_float(BFloat16 value) { return bit_cast<float>(uint32_t(value) << 16); }

HOST_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(uint16_t(value)));
  return wide;
#else
  const uint32_t sign = (uint32_t(value) & 0x8000u) << 16;
  const uint32_t rest = uint32_t(value) & 0x7fffu;
  // Infinity and NaN keep their mantissa; other normal numbers move by the difference of the exponents'
  // biases.
  const uint32_t normal = (rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u);
  // A subnormal is its mantissa times 2^-24: as the mantissa of 0.5 it is 2^-24 each, exactly.
  const float subnormal = bit_cast<float>(rest | 0x3f000000u) - 0.5f;
  return bit_cast<float>(sign | (rest < 0x0400u ? bit_cast<uint32_t>(subnormal) : normal));
#endif
}

// Rounds to nearest, ties to even.
template <class T>
HOST_DEVICE T from_float(float value);

template <>
HOST_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
HOST_DEVICE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16(is_nan ? 0x7fc0u : rounded);
}

template <>
HOST_DEVICE Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(value));
  return Half(narrow);
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  const uint32_t normal = (rest - 0x38000000u + 0x0fffu + ((rest >> 13) & 1u)) >> 13;
  const uint32_t finite = normal < 0x7c00u ? normal : 0x7c00u;  // rounding may already have made it infinite
  // Below 2^-14, adding 0.5 rounds to a multiple of 2^-24 and leaves it in the low bits.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  // Masks, since compilers narrow a chain of selects to 16 bits and then do not vectorise it.
  const uint32_t is_small = 0u - uint32_t(rest < 0x38800000u);
  const uint32_t is_nan = 0u - uint32_t(rest > 0x7f800000u);
  return Half(sign | (subnormal & is_small) | (finite & ~is_small) | (0x7e00u & is_nan));
#endif
}

// Two numbers in half precision that lie in one word, the first in its low half.
template <class T>
HOST_DEVICE float first_of(uint32_t word) {
  return to_float(T(uint16_t(word)));
}

template <class T>
HOST_DEVICE float second_of(uint32_t word) {
  return to_float(T(uint16_t(word >> 16)));
}

template <>
HOST_DEVICE float second_of<BFloat16>(uint32_t word) {
  return bit_cast<float>(word & 0xffff0000u);
}

template <class T>
HOST_DEVICE uint32_t word_of(float first, float second) {
  return uint32_t(from_float<T>(first)) | uint32_t(from_float<T>(second)) << 16;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
HOST_DEVICE uint32_t word_of<BFloat16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

template <>
HOST_DEVICE uint32_t word_of<Half>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
#endif

enum class Format : int32_t { FLOAT32, FLOAT16, BFLOAT16 };

// Calls run.operator()<T>() with the type of a format.
template <class Run>
void with_format(Format format, const Run& run) {
  switch (format) {
    case Format::FLOAT32: return run.template operator()<float>();
    case Format::FLOAT16: return run.template operator()<Half>();
    case Format::BFLOAT16: return run.template operator()<BFloat16>();
  }
}

}  // namespace blip2_kernels
