// Sums in CUDA kernels: over the threads of a row, and over the parts that rows fall into.
#pragma once

#include "octet.h"
#include "row_sums.h"

namespace blip2_kernels {

constexpr int kWarp = 32;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sums over the kThreads threads of a row, the same in each: a warp, or several, which bring memory for
// kCount numbers a warp of the block. All threads of the block take part, and between two calls with the same
// memory they must have met.
template <int kThreads, int kCount>
__device__ __forceinline__ void sum_over_row(float (&values)[kCount], float (*memory)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
  if constexpr (kThreads > kWarp) {
    if (threadIdx.x % kWarp == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) memory[threadIdx.x / kWarp][i] = values[i];
    __syncthreads();
    const int first = threadIdx.x / kThreads * (kThreads / kWarp);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = memory[first][i];
#pragma unroll
      for (int warp = 1; warp < kThreads / kWarp; ++warp) values[i] += memory[first + warp][i];
    }
  }
}

// Sums of parts: `count` vectors of `width` floats a part.
struct PartSums {
  const float* partials;  // [parts, count, width]
  int64_t parts;
  int count;
  int64_t width;
  void* sums[3];  // [width] each; null ones are left out
};

constexpr int kColumns = 16;  // of a block
constexpr int kSlices = 16;   // threads that share the parts of a column
constexpr int kBatch = 16;    // loads of a thread that are under way at once

// Grid: groups of kColumns columns × vectors. A block owns such a group of one vector: slices of the parts
// are added up in order, then the slices.
template <class T>
__global__ void __launch_bounds__(kColumns* kSlices) sum_parts_kernel(PartSums a) {
  __shared__ float slices[kSlices][kColumns];
  const int lane = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  // Chosen, not indexed: parameters that are indexed at run time are copied to the stack.
  void* const chosen = blockIdx.y == 0 ? a.sums[0] : blockIdx.y == 1 ? a.sums[1] : a.sums[2];
  T* out = static_cast<T*>(chosen);
  float sum = 0.0f, lost = 0.0f;  // what rounding took from the sum is added to the next summand
  if (out != nullptr && column < a.width) {
    const int64_t stride = a.count * a.width, last = first_row_of_part(slice + 1, kSlices, a.parts);
    int64_t part = first_row_of_part(slice, kSlices, a.parts);
    const float* next = a.partials + part * stride + blockIdx.y * a.width + column;
    const auto add = [&](float given) {
      const float summand = given - lost, larger = sum + summand;
      lost = (larger - sum) - summand;
      sum = larger;
    };
    for (; part + kBatch <= last; part += kBatch) {
      float summands[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, next += stride) summands[i] = *next;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) add(summands[i]);
    }
#pragma unroll 4
    for (; part < last; ++part, next += stride) add(*next);
  }
  slices[slice][lane] = sum;
  __syncthreads();
  if (slice == 0 && out != nullptr && column < a.width) {
#pragma unroll
    for (int other = 1; other < kSlices; ++other) sum += slices[other][lane];
    out[column] = from_float<T>(sum);
  }
}

template <class T>
const char* sum_parts(const PartSums& a, void* stream) {
  const dim3 grid(unsigned((a.width + kColumns - 1) / kColumns), unsigned(a.count));
  return launch(sum_parts_kernel<T>, grid, dim3(kColumns * kSlices), stream, a);
}

}  // namespace blip2_kernels
