// What the CUDA kernels with a LayerNorm share: a row's statistics, and the end of a part's sums.
#pragma once

#include "cuda_sums.h"
#include "layer_norm.h"

namespace blip2_kernels {

// Blocks of `threads` that a multiprocessor shall hold, for this many registers a thread.
constexpr int resident(int threads, int registers) { return 65536 / (threads * registers); }

// Registers that hold an octet as it lies in memory.
template <class T>
constexpr int kWords = kLanes * sizeof(T) / sizeof(uint32_t);

// 1 / the standard deviation of a row around its mean, the same in all its threads.
template <int kThreads, int kOctets, bool kWide>
__device__ __forceinline__ float reciprocal_deviation(
    const Octet (&hidden)[kOctets], float mean, int thread, int width, float inverse_width, float eps,
    float (*memory)[1]) {
  float squares[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kOctets; ++i)
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const float centred = hidden[i].value[lane] - mean;
      const int first = (thread + i * kThreads) * kLanes;
      if ((kWide ? first : first + lane) < width) squares[0] += centred * centred;
    }
  sum_over_row<kThreads>(squares, memory);
  return reciprocal_root(squares[0] * inverse_width + eps);
}

// Ends a backward's part: adds up what its kGroups groups of kThreads threads summed, and writes the vectors
// that somebody asks for to a.partials.
template <int kThreads, int kGroups, bool kWide, class Arguments, int kSums, int kOctets>
__device__ __forceinline__ void store_part(
    const Arguments& a, Octet (&sums)[kSums][kOctets], int thread, int group, int width, int octets) {
  if constexpr (kGroups > 1) {
    static_assert(kOctets == 1);
    __shared__ float others[kGroups - 1][kSums][kLanes][kThreads];
    if (group > 0)
#pragma unroll
      for (int kind = 0; kind < kSums; ++kind)
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane)
          others[group - 1][kind][lane][thread] = sums[kind][0].value[lane];
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int other = 0; other < kGroups - 1; ++other)
#pragma unroll
      for (int kind = 0; kind < kSums; ++kind)
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane)
          sums[kind][0].value[lane] += others[other][kind][lane][thread];
  }
#pragma unroll
  for (int kind = 0; kind < kSums; ++kind)
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      float* partials = a.partials + (int64_t(blockIdx.x) * kSums + kind) * a.width;
      if (octet < octets && a.sums[kind] != nullptr)
        store_octet<kWide>(partials, octet, width, sums[kind][i]);
    }
}

// Calls run.operator()<kThreads, kOctets, kWide>() with a forward's kernel for rows of so many octets: a warp
// for rows of up to 1,024 channels, beyond that a block; a thread then holds 32 channels at most. Rows that
// cannot be read in units of 16 bytes are rare, and get fewer kernels; they sum up in the same order.
template <class Run>
void with_forward_threads(int octets, bool wide, const Run& run) {
  if (!wide)
    octets <= 128 ? run.template operator()<32, 4, false>() : run.template operator()<128, 4, false>();
  else
    octets <= 32    ? run.template operator()<32, 1, true>()
    : octets <= 64  ? run.template operator()<32, 2, true>()
    : octets <= 96  ? run.template operator()<32, 3, true>()
    : octets <= 128 ? run.template operator()<32, 4, true>()
    : octets <= 256 ? run.template operator()<128, 2, true>()
                    : run.template operator()<128, 4, true>();
}

// The same with <kThreads, kGroups, kOctets, kWide> of a backward. It holds sums of every channel besides:
// fewer channels a thread.
template <class Run>
void with_backward_threads(int octets, bool wide, const Run& run) {
  if (!wide)
    octets <= 32    ? run.template operator()<32, 4, 1, false>()
    : octets <= 128 ? run.template operator()<128, 2, 1, false>()
                    : run.template operator()<256, 1, 2, false>();
  else
    octets <= 32    ? run.template operator()<32, 4, 1, true>()
    : octets <= 96  ? run.template operator()<96, 2, 1, true>()
    : octets <= 128 ? run.template operator()<128, 2, 1, true>()
    : octets <= 256 ? run.template operator()<256, 1, 1, true>()
                    : run.template operator()<256, 1, 2, true>();
}

}  // namespace blip2_kernels
