// add_layer_norm on CUDA: a row stays in the registers of one warp, or of one block where it is wide.
#include "add_layer_norm.h"

#include "cuda_sums.h"

namespace blip2_kernels {
namespace {

constexpr int kBlock = 128;  // threads, where a row belongs to a warp

// What is normalised of a row: residual + dropout(x + input_bias).
template <class X, class T>
__device__ __forceinline__ Octet load_hidden(
    const AddLayerNorm& a, const Dropout& dropout, int64_t row, int octet, bool wide) {
  const int width = int(a.width);
  Octet hidden = load_octet(static_cast<const X*>(a.x) + row * a.x_stride, octet, width, wide);
  const Octet residual = load_octet(static_cast<const T*>(a.residual) + row * a.residual_stride, octet, width, wide);
  if (a.input_bias != nullptr) add_to(hidden, load_octet(static_cast<const T*>(a.input_bias), octet, width, wide));
  if (dropout.level != 0) drop_octet(hidden, dropout, a.dropout.row_keys[row], octet);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) hidden.value[lane] = residual.value[lane] + hidden.value[lane];
  return hidden;
}

// Grid: rows, or groups of as many as a block has warps. kThreads threads own a row; each holds kOctets octets.
template <class X, class T, int kThreads, int kOctets>
__global__ void __launch_bounds__(kBlock) forward_kernel(AddLayerNormForward a, bool wide) {
  __shared__ float memory[2][kBlock / kWarp];
  const int thread = threadIdx.x % kThreads;
  const int64_t row = int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= a.rows) return;  // of a block that has several rows: no other warp waits for this one
  const Dropout dropout = Dropout::of(a.dropout);
  const int width = int(a.width), octets = octets_of(width);

  Octet hidden[kOctets];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = thread + i * kThreads;
    hidden[i] = octet < octets ? load_hidden<X, T>(a, dropout, row, octet, wide) : zero_octet();
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum += hidden[i].value[lane];
  }
  const float mean = row_sum<kThreads>(sum, memory[0]) / width;

  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctets; ++i)
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const float centred = hidden[i].value[lane] - mean;
      if ((thread + i * kThreads) * kLanes + lane < width) squares += centred * centred;
    }
  const float rstd = 1.0f / sqrtf(row_sum<kThreads>(squares, memory[1]) / width + a.eps);

  T* out = static_cast<T*>(a.out) + row * a.width;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = thread + i * kThreads;
    if (octet < octets) {
      const Octet weight = load_octet(static_cast<const T*>(a.weight), octet, width, wide);
      const Octet bias = load_octet(static_cast<const T*>(a.bias), octet, width, wide);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const float normal = normalized(hidden[i].value[lane], mean, rstd);
        hidden[i].value[lane] = normal * weight.value[lane] + bias.value[lane];
      }
      store_octet(out, octet, width, wide, hidden[i]);
    }
  }
  if (thread == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

// Grid: parts of the rows, or groups of as many as a block has warps. kThreads threads own a part: they go
// through its rows in order and hold its sums.
template <class X, class T, int kThreads, int kOctets>
__global__ void __launch_bounds__(kThreads > kBlock ? kThreads : kBlock)
    backward_kernel(AddLayerNormBackward a, bool wide) {
  constexpr int kThreadsInBlock = kThreads > kBlock ? kThreads : kBlock;
  // Two rows' worth: a thread may begin the next row while another still reads the sums of this one.
  __shared__ float memory[2][2][kThreadsInBlock / kWarp];
  const int thread = threadIdx.x % kThreads;
  const int64_t part = int64_t(blockIdx.x) * (kThreadsInBlock / kThreads) + threadIdx.x / kThreads;
  if (part >= a.parts) return;
  const Dropout dropout = Dropout::of(a.dropout);
  const int width = int(a.width), octets = octets_of(width);

  const float inverse_width = 1.0f / width;
  Octet weight[kOctets], sums[kNormSums][kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = thread + i * kThreads;
    const bool own = octet < octets;
    weight[i] = own ? load_octet(static_cast<const T*>(a.weight), octet, width, wide) : zero_octet();
#pragma unroll
    for (int kind = 0; kind < kNormSums; ++kind) sums[kind][i] = zero_octet();
  }

  const int64_t last = first_row_of_part(part + 1, a.parts, a.rows);
  for (int64_t row = first_row_of_part(part, a.parts, a.rows); row < last; ++row) {
    const float mean = a.mean[row], rstd = a.rstd[row];
    Octet normal[kOctets], weighted[kOctets];
    float sum_weighted = 0.0f, sum_product = 0.0f;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      normal[i] = weighted[i] = zero_octet();
      if (octet < octets) {
        const T* row_grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
        const Octet grad = load_octet(row_grad, octet, width, wide);
        const Octet hidden = load_hidden<X, T>(a, dropout, row, octet, wide);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          // Behind the width grad and weight are 0, so nothing of what is computed there counts.
          normal[i].value[lane] = normalized(hidden.value[lane], mean, rstd);
          weighted[i].value[lane] = grad.value[lane] * weight[i].value[lane];
          sums[0][i].value[lane] += grad.value[lane] * normal[i].value[lane];
          sums[1][i].value[lane] += grad.value[lane];
          sum_weighted += weighted[i].value[lane];
          sum_product += weighted[i].value[lane] * normal[i].value[lane];
        }
      }
    }
    float(*own_memory)[kThreadsInBlock / kWarp] = memory[row % 2];
    const float mean_weighted = row_sum<kThreads>(sum_weighted, own_memory[0]) * inverse_width;
    const float mean_product = row_sum<kThreads>(sum_product, own_memory[1]) * inverse_width;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      if (octet < octets) {
        Octet gradient;
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane)
          gradient.value[lane] = hidden_gradient(
              weighted[i].value[lane], mean_weighted, normal[i].value[lane], mean_product, rstd);
        if (a.dresidual != nullptr)
          store_octet(static_cast<T*>(a.dresidual) + row * a.width, octet, width, wide, gradient);
        if (dropout.level != 0) drop_octet(gradient, dropout, a.dropout.row_keys[row], octet);
        store_octet(static_cast<X*>(a.dx) + row * a.width, octet, width, wide, gradient);
        add_to(sums[2][i], gradient);
      }
    }
  }

#pragma unroll
  for (int kind = 0; kind < kNormSums; ++kind)
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      float* partials = a.partials + (part * kNormSums + kind) * a.width;
      if (octet < octets && a.sums[kind] != nullptr) store_octet(partials, octet, width, wide, sums[kind][i]);
    }
}

template <class X, class T>
bool all_wide(const AddLayerNorm& a) {
  return a.width % kLanes == 0 && is_wide<X>(a.x, a.x_stride) && is_wide<T>(a.residual, a.residual_stride) &&
      is_wide<T>(a.weight, 0) && is_wide<T>(a.input_bias, 0);
}

template <class X, class T, int kThreads, int kOctets>
const char* run_forward(const AddLayerNormForward& a, void* stream) {
  constexpr int kRows = kBlock / kThreads;
  const bool wide = all_wide<X, T>(a) && is_wide<T>(a.bias, 0) && is_wide<T>(a.out, a.width);
  const dim3 grid(unsigned((a.rows + kRows - 1) / kRows));
  return launch(forward_kernel<X, T, kThreads, kOctets>, grid, dim3(kBlock), stream, a, wide);
}

template <class X, class T, int kThreads, int kOctets>
const char* run_backward(const AddLayerNormBackward& a, void* stream) {
  constexpr int kThreadsInBlock = kThreads > kBlock ? kThreads : kBlock;
  constexpr int kParts = kThreadsInBlock / kThreads;
  const bool wide = all_wide<X, T>(a) && is_wide<T>(a.grad, a.grad_stride) && is_wide<X>(a.dx, a.width) &&
      is_wide<T>(a.dresidual, a.width) && is_wide<float>(a.partials, a.width);
  const dim3 grid(unsigned((a.parts + kParts - 1) / kParts));
  if (a.parts > 0) {
    const char* error =
        launch(backward_kernel<X, T, kThreads, kOctets>, grid, dim3(kThreadsInBlock), stream, a, wide);
    if (error != nullptr) return error;
  }
  const PartSums sums{a.partials, a.parts, kNormSums, a.width, {a.sums[0], a.sums[1], a.sums[2]}};
  return sum_parts<T>(sums, stream);
}

}  // namespace

// A warp for rows of up to 1,024 channels, beyond that a block: a thread then holds 32 channels at most.
const char* add_layer_norm_cuda(const AddLayerNormForward& a, void* stream) {
  const char* error = nullptr;
  with_norm_formats(a, [&]<class X, class T>() {
    const int octets = octets_of(a.width);
    error = octets <= 32 ? run_forward<X, T, 32, 1>(a, stream)
        : octets <= 64   ? run_forward<X, T, 32, 2>(a, stream)
        : octets <= 96   ? run_forward<X, T, 32, 3>(a, stream)
        : octets <= 128  ? run_forward<X, T, 32, 4>(a, stream)
        : octets <= 256  ? run_forward<X, T, 128, 2>(a, stream)
                         : run_forward<X, T, 128, 4>(a, stream);
  });
  return error;
}

// The backward holds three sums of every channel besides: fewer channels a thread.
const char* add_layer_norm_backward_cuda(const AddLayerNormBackward& a, void* stream) {
  const char* error = nullptr;
  with_norm_formats(a, [&]<class X, class T>() {
    const int octets = octets_of(a.width);
    error = octets <= 32 ? run_backward<X, T, 32, 1>(a, stream)
        : octets <= 128  ? run_backward<X, T, 128, 1>(a, stream)
        : octets <= 256  ? run_backward<X, T, 256, 1>(a, stream)
                         : run_backward<X, T, 256, 2>(a, stream);
  });
  return error;
}

}  // namespace blip2_kernels
