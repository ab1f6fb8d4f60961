// Eight neighbouring channels: what a CUDA thread works on at a time, what a Philox call serves, and 16 bytes
// in half precision.
#pragma once

#include "cuda_launch.h"
#include "number.h"
#include "philox.h"

namespace blip2_kernels {

struct Octet {
  float value[kLanes];
};

// What one instruction loads or stores.
struct alignas(16) Sixteen {
  uint32_t word[4];
};

// An octet as it lies in memory: to be loaded long before it is used, in few registers.
template <class T>
struct Packed {
  static constexpr int kUnits = kLanes * sizeof(T) / sizeof(Sixteen);
  Sixteen unit[kUnits];
};

__host__ __device__ inline int octets_of(int64_t width) { return int((width + kLanes - 1) / kLanes); }

// Whether octets of a tensor's rows can be read in units of 16 bytes.
template <class T>
bool is_wide(const void* data, int64_t stride) {
  return data == nullptr || (uintptr_t(data) % 16 == 0 && stride * int64_t(sizeof(T)) % 16 == 0);
}

// Octet number `octet` of a row; channels from `width` on are 0, and all of them where it is not `there`.
// With kWide the whole octet is there, aligned, or nothing of it. No branch: loads that follow one another
// are under way at once. With kAssumeGlobal the compiler is told what it could not find out: that the row is
// in global memory.
template <bool kWide, bool kAssumeGlobal = false, class T>
__device__ __forceinline__ Packed<T> fetch_octet(const T* row, int octet, int width, bool there) {
  Packed<T> out = {};
  const T* data = row + octet * kLanes;
  if constexpr (kWide) {
    if (kAssumeGlobal && there) assume_global(data);
#pragma unroll
    for (int unit = 0; unit < Packed<T>::kUnits; ++unit)
      if (there) out.unit[unit] = reinterpret_cast<const Sixteen*>(data)[unit];
  } else {
    T values[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      values[lane] = there && octet * kLanes + lane < width ? data[lane] : T(0);
    memcpy(&out, values, sizeof(out));
  }
  return out;
}

template <class T>
__device__ __forceinline__ Octet unpack(const Packed<T>& packed) {
  Octet out;
#pragma unroll
  for (int unit = 0; unit < Packed<T>::kUnits; ++unit)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = packed.unit[unit].word[i];
      if constexpr (sizeof(T) == sizeof(float)) {
        out.value[unit * 4 + i] = bit_cast<float>(word);
      } else {
        out.value[i * 2] = first_of<T>(word);
        out.value[i * 2 + 1] = second_of<T>(word);
      }
    }
  return out;
}

template <class T>
__device__ __forceinline__ Packed<T> pack(const Octet& octet) {
  Packed<T> out;
#pragma unroll
  for (int unit = 0; unit < Packed<T>::kUnits; ++unit)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == sizeof(float))
        out.unit[unit].word[i] = bit_cast<uint32_t>(octet.value[unit * 4 + i]);
      else
        out.unit[unit].word[i] = word_of<T>(octet.value[i * 2], octet.value[i * 2 + 1]);
    }
  return out;
}

template <bool kWide, class T>
__device__ __forceinline__ void store_octet(T* row, int octet, int width, const Octet& given) {
  T* data = row + octet * kLanes;
  if constexpr (kWide) {
    const Packed<T> packed = pack<T>(given);
#pragma unroll
    for (int unit = 0; unit < Packed<T>::kUnits; ++unit)
      reinterpret_cast<Sixteen*>(data)[unit] = packed.unit[unit];
  } else {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      if (octet * kLanes + lane < width) data[lane] = from_float<T>(given.value[lane]);
  }
}

__device__ __forceinline__ Octet zero_octet() {
  Octet out;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) out.value[lane] = 0.0f;
  return out;
}

__device__ __forceinline__ void add_to(Octet& sum, const Octet& other) {
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) sum.value[lane] += other.value[lane];
}

// Dropout of an octet of the row with this key.
__device__ __forceinline__ void drop_octet(
    Octet& octet, const Dropout& dropout, int32_t row_key, int number) {
  const PhiloxWords words = philox(dropout, uint32_t(row_key), uint32_t(number));
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane)
    octet.value[lane] = drop(dropout, random_of_lane(words, lane), octet.value[lane]);
}

}  // namespace blip2_kernels
