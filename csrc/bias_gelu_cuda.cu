// bias_gelu on CUDA: a warp owns 32 octets of channels and goes down a part of the rows.
#include "bias_gelu.h"

#include "cuda_sums.h"

namespace blip2_kernels {
namespace {

constexpr int kWarps = 4;            // of a block, one part each
constexpr int64_t kMaxGrid = 65535;  // blocks along y

struct Place {
  int octet;
  int64_t part;

  __device__ static Place here() {
    return {int(blockIdx.x * kWarp + threadIdx.x % kWarp), int64_t(blockIdx.y) * kWarps + threadIdx.x / kWarp};
  }
};

template <class T, class B>
__global__ void __launch_bounds__(kWarp * kWarps) forward_kernel(BiasGeluForward a, int64_t parts, bool wide) {
  const Place place = Place::here();
  const int width = int(a.width);
  if (place.octet >= octets_of(width) || place.part >= parts) return;
  const bool biased = a.bias != nullptr;
  const B* bias_row = static_cast<const B*>(a.bias);
  const Octet bias = biased ? load_octet(bias_row, place.octet, width, wide) : zero_octet();
  const int64_t last = first_row_of_part(place.part + 1, parts, a.rows);
  for (int64_t row = first_row_of_part(place.part, parts, a.rows); row < last; ++row) {
    Octet x = load_octet(static_cast<const T*>(a.x) + row * a.x_stride, place.octet, width, wide);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) x.value[lane] = gelu(x.value[lane] + bias.value[lane]);
    store_octet(static_cast<T*>(a.out) + row * a.width, place.octet, width, wide, x);
  }
}

template <class T, class B>
__global__ void __launch_bounds__(kWarp * kWarps) backward_kernel(BiasGeluBackward a, bool wide) {
  const Place place = Place::here();
  const int width = int(a.width);
  if (place.octet >= octets_of(width) || place.part >= a.parts) return;
  const bool biased = a.bias != nullptr;
  const B* bias_row = static_cast<const B*>(a.bias);
  const Octet bias = biased ? load_octet(bias_row, place.octet, width, wide) : zero_octet();
  Octet sum = zero_octet();
  const int64_t last = first_row_of_part(place.part + 1, a.parts, a.rows);
  for (int64_t row = first_row_of_part(place.part, a.parts, a.rows); row < last; ++row) {
    const Octet x = load_octet(static_cast<const T*>(a.x) + row * a.x_stride, place.octet, width, wide);
    Octet d = load_octet(static_cast<const T*>(a.grad) + row * a.grad_stride, place.octet, width, wide);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) d.value[lane] *= gelu_gradient(x.value[lane] + bias.value[lane]);
    store_octet(static_cast<T*>(a.dx) + row * a.width, place.octet, width, wide, d);
    add_to(sum, d);
  }
  if (biased) store_octet(a.partials + place.part * a.width, place.octet, width, wide, sum);
}

dim3 grid_of(int64_t width, int64_t parts) {
  return dim3(unsigned((octets_of(width) + kWarp - 1) / kWarp), unsigned((parts + kWarps - 1) / kWarps));
}

template <class T, class B>
bool all_wide(const BiasGelu& a) {
  return a.width % kLanes == 0 && is_wide<T>(a.x, a.x_stride) && is_wide<B>(a.bias, 0);
}

}  // namespace

const char* bias_gelu_cuda(const BiasGeluForward& a, void* stream) {
  const char* error = nullptr;
  with_gelu_formats(a, [&]<class T, class B>() {
    const bool wide = all_wide<T, B>(a) && is_wide<T>(a.out, a.width);
    int64_t parts = (a.rows + 3) / 4;  // four rows a warp: the bias is worth keeping, the GPU is full
    if (parts > kMaxGrid * kWarps) parts = kMaxGrid * kWarps;
    error = launch(forward_kernel<T, B>, grid_of(a.width, parts), dim3(kWarp * kWarps), stream, a, parts, wide);
  });
  return error;
}

const char* bias_gelu_backward_cuda(const BiasGeluBackward& given, void* stream) {
  const char* error = nullptr;
  with_gelu_formats(given, [&]<class T, class B>() {
    // More parts than a grid has only where there are 16 million rows.
    BiasGeluBackward a = given;
    if (a.parts > kMaxGrid * kWarps) a.parts = kMaxGrid * kWarps;
    const bool wide = all_wide<T, B>(a) && is_wide<T>(a.grad, a.grad_stride) && is_wide<T>(a.dx, a.width) &&
        is_wide<float>(a.partials, a.width);
    if (a.parts > 0) {
      const dim3 grid = grid_of(a.width, a.parts);
      error = launch(backward_kernel<T, B>, grid, dim3(kWarp * kWarps), stream, a, wide);
    }
    if (error == nullptr && a.dbias != nullptr)
      error = sum_parts<B>({a.partials, a.parts, 1, a.width, {a.dbias}}, stream);
  });
  return error;
}

}  // namespace blip2_kernels
