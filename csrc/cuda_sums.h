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

// The sum over the kThreads threads of a row, the same in each: one warp, or the whole block, which brings
// memory for a number a warp. Between two calls with the same memory the threads must have met.
template <int kThreads>
__device__ __forceinline__ float row_sum(float value, float* memory) {
  value = warp_sum(value);
  if constexpr (kThreads > kWarp) {
    if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) value += memory[warp];
  }
  return value;
}

// Sums of parts: `count` vectors of `width` floats a part.
struct PartSums {
  const float* partials;  // [parts, count, width]
  int64_t parts;
  int count;
  int64_t width;
  void* sums[3];  // [width] each; null ones are left out
};

constexpr int kSlices = 8;  // threads that share the parts of a column

// Grid: columns of a warp × vectors. A block owns 32 columns of one vector: slices of the parts are added up in
// order, then the slices.
template <class T>
__global__ void sum_parts_kernel(PartSums a) {
  __shared__ float slices[kSlices][kWarp];
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane;
  // Chosen, not indexed: parameters that are indexed at run time are copied to the stack.
  void* const chosen = blockIdx.y == 0 ? a.sums[0] : blockIdx.y == 1 ? a.sums[1] : a.sums[2];
  T* out = static_cast<T*>(chosen);
  float sum = 0.0f, lost = 0.0f;  // what rounding took from the sum is added to the next summand
  if (out != nullptr && column < a.width) {
    const float* partials = a.partials + blockIdx.y * a.width + column;
    const int64_t last = first_row_of_part(slice + 1, kSlices, a.parts);
    for (int64_t part = first_row_of_part(slice, kSlices, a.parts); part < last; ++part) {
      const float summand = partials[part * a.count * a.width] - lost;
      const float next = sum + summand;
      lost = (next - sum) - summand;
      sum = next;
    }
  }
  slices[slice][lane] = sum;
  __syncthreads();
  if (slice == 0 && out != nullptr && column < a.width) {
    for (int other = 1; other < kSlices; ++other) sum += slices[other][lane];
    out[column] = from_float<T>(sum);
  }
}

template <class T>
const char* sum_parts(const PartSums& a, void* stream) {
  const dim3 grid(unsigned((a.width + kWarp - 1) / kWarp), unsigned(a.count));
  return launch(sum_parts_kernel<T>, grid, dim3(kWarp * kSlices), stream, a);
}

}  // namespace blip2_kernels
