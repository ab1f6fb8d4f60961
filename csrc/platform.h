// What a function needs to be compiled for the host and for the device alike. Nothing here includes torch.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined, so that it is compiled again for the instruction set of whoever calls it (cpu_target.h).
#define HOST_DEVICE [[gnu::always_inline]] inline
#else
#define HOST_DEVICE inline
#endif

namespace blip2_kernels {

template <class To, class From>
HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

HOST_DEVICE float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);  // 2 units in the last place
#else
  return 1.0f / sqrtf(x);
#endif
}

// Tells a CUDA compiler that a pointer is to global memory, where it has been chosen among several.
HOST_DEVICE void assume_global([[maybe_unused]] const void* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
}

// A product that is rounded wherever it stands, never fused with a sum behind it: a backward that computes
// again what its forward computed gets the same bits.
HOST_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#elif defined(__clang__)
#pragma clang fp contract(off)
  return a * b;
#elif !defined(__CUDACC__) && defined(__GNUC__) && __GNUC__ >= 12
  return __builtin_assoc_barrier(a * b);
#else
  return a * b;
#endif
}

}  // namespace blip2_kernels
