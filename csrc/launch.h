// Which launcher runs an operator: the CPU's, or CUDA's on the current stream of the tensors' device.
#pragma once

#include "outputs.h"

#ifdef BLIP2_KERNELS_CUDA
#include <torch/csrc/stable/accelerator.h>

// Weak: a torch without CUDA has no such function, and the library still loads there and serves CPU tensors.
extern "C" [[gnu::weak]] int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace blip2_kernels {

// Whether the tests run the CUDA kernels on CPU tensors, in place of what is for the CPU.
#ifdef BLIP2_KERNELS_CUDA_ON_HOST
constexpr bool kCudaOnHost = true;
#else
constexpr bool kCudaOnHost = false;
#endif

// How many parts the rows fall into, for sums over them (row_sums.h): enough to keep a machine busy, which
// for CUDA is given, but there of 4 rows at least, and of no more than 64, since an error grows with the rows
// that are added one after the other. A function of the shape and the kind of device alone.
inline int64_t parts_of(int64_t rows, int64_t enough_for_cuda, const Tensor& beside) {
  const bool on_cpu = beside.is_cpu() && !kCudaOnHost;
  const int64_t enough = on_cpu ? std::min<int64_t>(rows, 64) : std::min((rows + 3) / 4, enough_for_cuda);
  return std::max(enough, (rows + 63) / 64);
}

inline void check_launch(const char* error) {
  if (error) throw std::runtime_error(std::string("blip2_kernels: a CUDA kernel was not launched: ") + error);
}

#if defined(BLIP2_KERNELS_CUDA_ON_HOST)

#define BLIP2_KERNELS_LAUNCH(beside, name, arguments) check_launch(name##_cuda((arguments), nullptr))

#elif defined(BLIP2_KERNELS_CUDA)

template <class Arguments>
void launch_on_cuda(
    const Tensor& beside, const char* (*launcher)(const Arguments&, void* stream),
    const Arguments& arguments) {
  const int32_t device = beside.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("blip2_kernels: this torch gave no CUDA stream");
  check_launch(launcher(arguments, stream));
}

#define BLIP2_KERNELS_LAUNCH(beside, name, arguments) \
  ((beside).is_cpu() ? name##_cpu(arguments) : launch_on_cuda((beside), name##_cuda, (arguments)))

#else

#define BLIP2_KERNELS_LAUNCH(beside, name, arguments) name##_cpu(arguments)

#endif

}  // namespace blip2_kernels
