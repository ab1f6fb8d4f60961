// How a kernel is launched: by CUDA, or on the host where the tests run kernels without a GPU.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace blip2_kernels {

// Returns null, or what CUDA says is wrong.
template <class... Parameters>
const char* launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, const Parameters&... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace blip2_kernels

#else

#include "cuda_on_host.h"

namespace blip2_kernels {

template <class... Parameters>
const char* launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, void*, const Parameters&... arguments) {
  cuda_on_host::run(grid, block, [&] { kernel(arguments...); });
  return nullptr;
}

}  // namespace blip2_kernels

#endif
