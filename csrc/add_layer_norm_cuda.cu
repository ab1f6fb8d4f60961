// add_layer_norm on CUDA: a row stays in the registers of one warp, or of several where it is wide.
#include "add_layer_norm.h"

#include "cuda_norm.h"

namespace blip2_kernels {
namespace {

constexpr int kForwardBlock = 128;  // threads

// What is normalised of a row: residual + dropout(x + input_bias).
template <bool kDrops>
__device__ __forceinline__ Octet hidden_octet(
    Octet x, const Octet& residual, const Octet& input_bias, const Dropout& dropout, int32_t row_key,
    int octet) {
  add_to(x, input_bias);
  if constexpr (kDrops) drop_octet(x, dropout, row_key, octet);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) x.value[lane] = residual.value[lane] + x.value[lane];
  return x;
}

// Loads are under way before anything is computed: of a row's x and residual and of input_bias, then of the
// other two vectors. So many registers hold them; rows that are read number by number take what they need.
template <class X, class T, int kOctets, bool kWide>
constexpr int kForwardRegisters = kWide ? 28 + kOctets * (kWords<X> + 2 * kWords<T>) : 248;

// Grid: groups of as many rows as a block has. kThreads threads own a row; each holds kOctets octets.
template <class X, class T, int kThreads, int kOctets, bool kWide, bool kDrops>
__global__ void __launch_bounds__(
    kForwardBlock,
    resident(kForwardBlock, kForwardRegisters<X, T, kOctets, kWide> + (kDrops ? 4 * kOctets : 0)))
    forward_kernel(AddLayerNormForward a, float inverse_width) {
  __shared__ float memory[2][kForwardBlock / kWarp][1];
  const int thread = threadIdx.x % kThreads;
  const int64_t row = int64_t(blockIdx.x) * (kForwardBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= a.rows) return;  // of a block that has several rows: no other warp waits for this one
  const Dropout dropout = Dropout::of(a.dropout);
  const int32_t row_key = kDrops ? a.dropout.row_keys[row] : 0;
  const int width = int(a.width), octets = octets_of(width);

  Packed<X> x[kOctets];
  Packed<T> residual[kOctets], input_bias[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = thread + i * kThreads;
    const bool there = octet < octets;
    x[i] = fetch_octet<kWide>(static_cast<const X*>(a.x) + row * a.x_stride, octet, width, there);
    residual[i] =
        fetch_octet<kWide>(static_cast<const T*>(a.residual) + row * a.residual_stride, octet, width, there);
  }
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = thread + i * kThreads;
    const bool there = octet < octets && a.input_bias != nullptr;
    input_bias[i] = fetch_octet<kWide>(static_cast<const T*>(a.input_bias), octet, width, there);
  }

  Octet hidden[kOctets];
  float sum[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    hidden[i] = hidden_octet<kDrops>(
        unpack(x[i]), unpack(residual[i]), unpack(input_bias[i]), dropout, row_key, thread + i * kThreads);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum[0] += hidden[i].value[lane];
  }
  Packed<T> weight[kOctets], bias[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = thread + i * kThreads;
    weight[i] = fetch_octet<kWide>(static_cast<const T*>(a.weight), octet, width, octet < octets);
    bias[i] = fetch_octet<kWide>(static_cast<const T*>(a.bias), octet, width, octet < octets);
  }
  sum_over_row<kThreads>(sum, memory[0]);
  const float mean = sum[0] * inverse_width;

  const float rstd = reciprocal_deviation<kThreads, kOctets, kWide>(
      hidden, mean, thread, width, inverse_width, a.eps, memory[1]);

#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = thread + i * kThreads;
    const Octet factor = unpack(weight[i]), summand = unpack(bias[i]);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const float normal = normalized(hidden[i].value[lane], mean, rstd);
      hidden[i].value[lane] = normal * factor.value[lane] + summand.value[lane];
    }
    if (octet < octets) store_octet<kWide>(static_cast<T*>(a.out) + row * a.width, octet, width, hidden[i]);
  }
  if (thread == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

// What the backward reads of a row.
template <class X, class T, int kOctets>
struct BackwardRow {
  Packed<T> grad[kOctets], residual[kOctets];
  Packed<X> x[kOctets];
  float mean, rstd;
  int32_t key;
};

// The least that nvcc does not spill at, or nearly: the fewer, the more warps wait for memory at once.
template <class X, class T, int kThreads, int kOctets, bool kWide, bool kDrops>
constexpr int kBackwardRegisters = kOctets > 1 || !kWide       ? 168
                                   : kWords<X> + kWords<T> > 8 ? 128
                                   : kDrops || kThreads > 128  ? 96
                                                               : 80;

// Grid: parts of the rows. kThreads threads own a row, kGroups of them share a part: they go through its rows
// by turns and hold their sums.
template <class X, class T, int kThreads, int kGroups, int kOctets, bool kWide, bool kDrops>
__global__ void __launch_bounds__(
    kThreads* kGroups,
    resident(kThreads* kGroups, kBackwardRegisters<X, T, kThreads, kOctets, kWide, kDrops>))
    backward_kernel(AddLayerNormBackward a, float inverse_width) {
  // Two rows' worth: a thread may begin the next row while another still reads the sums of this one.
  __shared__ float memory[2][kThreads * kGroups / kWarp][2];
  const int thread = threadIdx.x % kThreads, group = threadIdx.x / kThreads;
  const Dropout dropout = Dropout::of(a.dropout);
  const int width = int(a.width), octets = octets_of(width);

  const int first = int(first_row_of_part(blockIdx.x, a.parts, a.rows));
  const int last = int(first_row_of_part(blockIdx.x + 1, a.parts, a.rows));
  const auto load = [&](int64_t row) {
    BackwardRow<X, T, kOctets> out;
    const bool row_there = row < last;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      const bool there = row_there && octet < octets;
      out.grad[i] =
          fetch_octet<kWide>(static_cast<const T*>(a.grad) + row * a.grad_stride, octet, width, there);
      out.x[i] = fetch_octet<kWide>(static_cast<const X*>(a.x) + row * a.x_stride, octet, width, there);
      out.residual[i] = fetch_octet<kWide>(
          static_cast<const T*>(a.residual) + row * a.residual_stride, octet, width, there);
    }
    // Of no row, nothing counts: its gradient is 0.
    out.mean = row_there ? a.mean[row] : 0.0f;
    out.rstd = row_there ? a.rstd[row] : 0.0f;
    out.key = kDrops && row_there ? a.dropout.row_keys[row] : 0;
    return out;
  };

  BackwardRow<X, T, kOctets> next = load(first + group);
  Octet sums[kNormSums][kOctets];
#pragma unroll
  for (int kind = 0; kind < kNormSums; ++kind)
#pragma unroll
    for (int i = 0; i < kOctets; ++i) sums[kind][i] = zero_octet();

  int turn = 0;
  for (int turn_row = first; turn_row < last; turn_row += kGroups, turn ^= 1) {
    const int64_t row = turn_row + group;
    const BackwardRow<X, T, kOctets> own = next;
    // The vectors are read again for every row, out of the first-level cache: registers are scarcer.
    Packed<T> weight[kOctets], input_bias[kOctets];
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      const bool there = octet < octets;
      weight[i] = fetch_octet<kWide>(static_cast<const T*>(a.weight), octet, width, there);
      input_bias[i] = fetch_octet<kWide>(
          static_cast<const T*>(a.input_bias), octet, width, there && a.input_bias != nullptr);
    }
    Octet normal[kOctets], weighted[kOctets];
    float row_sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const Octet hidden = hidden_octet<kDrops>(
          unpack(own.x[i]), unpack(own.residual[i]), unpack(input_bias[i]), dropout, own.key,
          thread + i * kThreads);
      const Octet grad = unpack(own.grad[i]), factor = unpack(weight[i]);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        // Behind the width grad and weight are 0, so nothing of what is computed there counts.
        normal[i].value[lane] = normalized(hidden.value[lane], own.mean, own.rstd);
        weighted[i].value[lane] = grad.value[lane] * factor.value[lane];
        sums[0][i].value[lane] += grad.value[lane] * normal[i].value[lane];
        sums[1][i].value[lane] += grad.value[lane];
        row_sums[0] += weighted[i].value[lane];
        row_sums[1] += weighted[i].value[lane] * normal[i].value[lane];
      }
    }
    next = load(row + kGroups);  // under way until the end of this turn, in the registers that held this row
    sum_over_row<kThreads>(row_sums, memory[turn]);
    const float mean_weighted = row_sums[0] * inverse_width, mean_product = row_sums[1] * inverse_width;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      const bool there = row < last && octet < octets;
      Octet gradient;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane)
        gradient.value[lane] = hidden_gradient(
            weighted[i].value[lane], mean_weighted, normal[i].value[lane], mean_product, own.rstd);
      if (there && a.dresidual != nullptr)
        store_octet<kWide>(static_cast<T*>(a.dresidual) + row * a.width, octet, width, gradient);
      if constexpr (kDrops) drop_octet(gradient, dropout, own.key, octet);
      if (there) store_octet<kWide>(static_cast<X*>(a.dx) + row * a.width, octet, width, gradient);
      add_to(sums[2][i], gradient);
    }
  }

  store_part<kThreads, kGroups, kWide>(a, sums, thread, group, width, octets);
}

template <class X, class T>
bool all_wide(const AddLayerNorm& a) {
  return a.width % kLanes == 0 && is_wide<X>(a.x, a.x_stride) && is_wide<T>(a.residual, a.residual_stride) &&
         is_wide<T>(a.weight, 0) && is_wide<T>(a.input_bias, 0);
}

template <class X, class T>
bool is_all_wide(const AddLayerNormForward& a) {
  return all_wide<X, T>(a) && is_wide<T>(a.bias, 0) && is_wide<T>(a.out, a.width);
}

template <class X, class T>
bool is_all_wide(const AddLayerNormBackward& a) {
  return all_wide<X, T>(a) && is_wide<T>(a.grad, a.grad_stride) && is_wide<X>(a.dx, a.width) &&
         is_wide<T>(a.dresidual, a.width) && is_wide<float>(a.partials, a.width);
}

template <class X, class T, int kThreads, int kOctets, bool kWide>
const char* run_forward(const AddLayerNormForward& a, void* stream) {
  constexpr int kRows = kForwardBlock / kThreads;
  const dim3 grid(unsigned((a.rows + kRows - 1) / kRows));
  const auto kernel = a.dropout.level != 0 ? forward_kernel<X, T, kThreads, kOctets, kWide, true>
                                           : forward_kernel<X, T, kThreads, kOctets, kWide, false>;
  return launch(kernel, grid, dim3(kForwardBlock), stream, a, 1.0f / float(a.width));
}

template <class X, class T, int kThreads, int kGroups, int kOctets, bool kWide>
const char* run_backward(const AddLayerNormBackward& a, void* stream) {
  const auto kernel = a.dropout.level != 0 ? backward_kernel<X, T, kThreads, kGroups, kOctets, kWide, true>
                                           : backward_kernel<X, T, kThreads, kGroups, kOctets, kWide, false>;
  return launch(kernel, dim3(unsigned(a.parts)), dim3(kThreads * kGroups), stream, a, 1.0f / float(a.width));
}

}  // namespace

const char* add_layer_norm_cuda(const AddLayerNormForward& a, void* stream) {
  const char* error = nullptr;
  with_norm_formats(a, [&]<class X, class T>() {
    with_forward_threads(
        octets_of(a.width), is_all_wide<X, T>(a), [&]<int kThreads, int kOctets, bool kWide>() {
          error = run_forward<X, T, kThreads, kOctets, kWide>(a, stream);
        });
  });
  return error;
}

const char* add_layer_norm_backward_cuda(const AddLayerNormBackward& a, void* stream) {
  const char* error = nullptr;
  with_norm_formats(a, [&]<class X, class T>() {
    const auto run = [&]<int kThreads, int kGroups, int kOctets, bool kWide>() {
      error = run_backward<X, T, kThreads, kGroups, kOctets, kWide>(a, stream);
    };
    if (a.parts > 0) with_backward_threads(octets_of(a.width), is_all_wide<X, T>(a), run);
    const PartSums sums{a.partials, a.parts, kNormSums, a.width, {a.sums[0], a.sums[1], a.sums[2]}};
    if (error == nullptr) error = sum_parts<T>(sums, stream);
  });
  return error;
}

}  // namespace blip2_kernels
