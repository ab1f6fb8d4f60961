// Eight neighbouring channels: what a CUDA thread works on at a time, what a Philox call serves, and 16 bytes in
// half precision.
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

__host__ __device__ inline int octets_of(int64_t width) { return int((width + kLanes - 1) / kLanes); }

// Whether octets of a tensor's rows can be read in units of 16 bytes.
template <class T>
bool is_wide(const void* data, int64_t stride) {
  return data == nullptr || (uintptr_t(data) % 16 == 0 && stride * int64_t(sizeof(T)) % 16 == 0);
}

// Octet number `octet` of a row; channels from `width` on are 0. With `wide` the whole octet is there, aligned.
template <class T>
__device__ __forceinline__ Octet load_octet(const T* row, int octet, int width, bool wide) {
  constexpr int kUnits = kLanes * sizeof(T) / sizeof(Sixteen), kInUnit = kLanes / kUnits;
  Octet out;
  const T* data = row + octet * kLanes;
  if (wide) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const Sixteen loaded = reinterpret_cast<const Sixteen*>(data)[unit];
      T values[kInUnit];
      memcpy(values, &loaded, sizeof(loaded));
#pragma unroll
      for (int i = 0; i < kInUnit; ++i) out.value[unit * kInUnit + i] = to_float(values[i]);
    }
  } else {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      out.value[lane] = octet * kLanes + lane < width ? to_float(data[lane]) : 0.0f;
  }
  return out;
}

template <class T>
__device__ __forceinline__ void store_octet(T* row, int octet, int width, bool wide, const Octet& given) {
  constexpr int kUnits = kLanes * sizeof(T) / sizeof(Sixteen), kInUnit = kLanes / kUnits;
  T* data = row + octet * kLanes;
  if (wide) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      T values[kInUnit];
#pragma unroll
      for (int i = 0; i < kInUnit; ++i) values[i] = from_float<T>(given.value[unit * kInUnit + i]);
      Sixteen stored;
      memcpy(&stored, values, sizeof(stored));
      reinterpret_cast<Sixteen*>(data)[unit] = stored;
    }
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
__device__ __forceinline__ void drop_octet(Octet& octet, const Dropout& dropout, int32_t row_key, int number) {
  const PhiloxWords words = philox(dropout, uint32_t(row_key), uint32_t(number));
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane)
    octet.value[lane] = drop(dropout, random_of_lane(words, lane), octet.value[lane]);
}

}  // namespace blip2_kernels
