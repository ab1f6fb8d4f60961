// bias_gelu on CUDA: a warp owns 32 octets of channels and goes down some rows, several at a time.
#include "bias_gelu.h"

#include "cuda_sums.h"

namespace blip2_kernels {
namespace {

constexpr int kWarps = 4;  // of a block
constexpr int kBlock = kWarp * kWarps;
constexpr int64_t kMaxGrid = 65535;  // blocks along y
constexpr int kForwardRows = 4;      // that a warp has under way at once
constexpr int kBackwardRows = 2;

// Blocks that a multiprocessor shall hold: the registers of a thread are bounded so.
template <class T, bool kWide>
constexpr int kForwardBlocks = !kWide           ? 4
                               : sizeof(T) == 2 ? 8
                                                : 5;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T, bool kWide>
constexpr int kBackwardBlocks = kWide ? 5 : 4;  // arithmetic on pairs of floats takes more registers
#else
template <class T, bool kWide>
constexpr int kBackwardBlocks = kForwardBlocks<T, kWide>;
#endif

struct Place {
  int octet;
  int64_t part;

  __device__ static Place here() {
    return {
        int(blockIdx.x * kWarp + threadIdx.x % kWarp), int64_t(blockIdx.y) * kWarps + threadIdx.x / kWarp};
  }
};

// Parts are of kForwardRows rows; a warp goes through every `parts`-th.
template <class T, class B, bool kWide>
__global__ void __launch_bounds__(kBlock, kForwardBlocks<T, kWide>)
    forward_kernel(BiasGeluForward a, int64_t parts) {
  const Place place = Place::here();
  const int width = int(a.width);
  if (place.octet >= octets_of(width)) return;
  for (int64_t first = place.part * kForwardRows; first < a.rows; first += parts * kForwardRows) {
    Packed<T> x[kForwardRows];
#pragma unroll
    for (int i = 0; i < kForwardRows; ++i) {
      const T* row = static_cast<const T*>(a.x) + (first + i) * a.x_stride;
      x[i] = fetch_octet<kWide>(row, place.octet, width, first + i < a.rows);
    }
    const Packed<B> bias =
        fetch_octet<kWide>(static_cast<const B*>(a.bias), place.octet, width, a.bias != nullptr);
#pragma unroll
    for (int i = 0; i < kForwardRows; ++i) {
      Octet out = unpack(x[i]);
      add_to(out, unpack(bias));
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) out.value[lane] = gelu(out.value[lane]);
      if (first + i < a.rows)
        store_octet<kWide>(static_cast<T*>(a.out) + (first + i) * a.width, place.octet, width, out);
    }
  }
}

template <class T, class B, bool kWide>
__global__ void __launch_bounds__(kBlock, kBackwardBlocks<T, kWide>) backward_kernel(BiasGeluBackward a) {
  const Place place = Place::here();
  const int width = int(a.width);
  if (place.octet >= octets_of(width) || place.part >= a.parts) return;
  Octet sum = zero_octet();
  const int64_t last = first_row_of_part(place.part + 1, a.parts, a.rows);
  for (int64_t first = first_row_of_part(place.part, a.parts, a.rows); first < last; first += kBackwardRows) {
    // Read again every time, out of the first-level cache: registers are scarcer.
    const Packed<B> bias =
        fetch_octet<kWide>(static_cast<const B*>(a.bias), place.octet, width, a.bias != nullptr);
    Packed<T> x[kBackwardRows], grad[kBackwardRows];
#pragma unroll
    for (int i = 0; i < kBackwardRows; ++i) {
      const int64_t row = first + i;
      const bool there = row < last;
      x[i] = fetch_octet<kWide>(static_cast<const T*>(a.x) + row * a.x_stride, place.octet, width, there);
      grad[i] =
          fetch_octet<kWide>(static_cast<const T*>(a.grad) + row * a.grad_stride, place.octet, width, there);
    }
#pragma unroll
    for (int i = 0; i < kBackwardRows; ++i) {
      Octet given = unpack(x[i]), d = unpack(grad[i]);
      add_to(given, unpack(bias));
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) d.value[lane] *= gelu_gradient(given.value[lane]);
      if (first + i < last) {
        store_octet<kWide>(static_cast<T*>(a.dx) + (first + i) * a.width, place.octet, width, d);
        add_to(sum, d);
      }
    }
  }
  if (a.dbias != nullptr) store_octet<kWide>(a.partials + place.part * a.width, place.octet, width, sum);
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
    const dim3 grid = grid_of(a.width, (a.rows + kForwardRows - 1) / kForwardRows);
    const dim3 bounded(grid.x, grid.y < kMaxGrid ? grid.y : unsigned(kMaxGrid));
    const int64_t parts = int64_t(bounded.y) * kWarps;
    const auto kernel = wide ? forward_kernel<T, B, true> : forward_kernel<T, B, false>;
    error = launch(kernel, bounded, dim3(kBlock), stream, a, parts);
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
    const auto kernel = wide ? backward_kernel<T, B, true> : backward_kernel<T, B, false>;
    if (a.parts > 0) error = launch(kernel, grid_of(a.width, a.parts), dim3(kBlock), stream, a);
    if (error == nullptr && a.dbias != nullptr)
      error = sum_parts<B>({a.partials, a.parts, 1, a.width, {a.dbias}}, stream);
  });
  return error;
}

}  // namespace blip2_kernels
