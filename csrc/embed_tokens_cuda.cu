// embed_tokens on CUDA: a row stays in the registers of one warp, or of several where it is wide.
#include "embed_tokens.h"

#include "cuda_norm.h"

namespace blip2_kernels {
namespace {

constexpr int kForwardBlock = 128;  // threads

// An octet of a row before its LayerNorm, as its summands lie in memory.
template <class T>
struct PackedSummands {
  Packed<T> first, second;

  __device__ __forceinline__ Octet sum() const {
    Octet out = unpack(first);
    add_to(out, unpack(second));
    return out;
  }
};

template <bool kWide, class T>
__device__ __forceinline__ PackedSummands<T> fetch_summands(
    const Summands<T>& summands, int octet, int width, bool there) {
  return {
      fetch_octet<kWide, true>(summands.first, octet, width, there),
      fetch_octet<kWide, true>(summands.second, octet, width, there && summands.second != nullptr)};
}

// Loads are under way before anything is computed: of a row's summands, then of the two vectors.
template <class T, int kOctets, bool kWide>
constexpr int kForwardRegisters = kWide ? 32 + kOctets * 3 * kWords<T> : 248;

// Grid: groups of as many rows as a block has. kThreads threads own a row; each holds kOctets octets.
template <class T, int kThreads, int kOctets, bool kWide, bool kDrops>
__global__ void __launch_bounds__(
    kForwardBlock, resident(kForwardBlock, kForwardRegisters<T, kOctets, kWide> + (kDrops ? 4 * kOctets : 0)))
    forward_kernel(EmbedTokensForward a, float inverse_width) {
  __shared__ float memory[2][kForwardBlock / kWarp][1];
  const int thread = threadIdx.x % kThreads;
  const int64_t row = int64_t(blockIdx.x) * (kForwardBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= a.rows) return;  // of a block that has several rows: no other warp waits for this one
  const Summands<T> summands = summands_of<T>(a, row);
  const Dropout dropout = Dropout::of(a.dropout);
  const int32_t row_key = kDrops ? a.dropout.row_keys[row] : 0;
  const int width = int(a.width), octets = octets_of(width);

  PackedSummands<T> packed[kOctets];
  Packed<T> weight[kOctets], bias[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = thread + i * kThreads;
    packed[i] = fetch_summands<kWide>(summands, octet, width, octet < octets);
  }
  Octet hidden[kOctets];
  float sum[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    hidden[i] = packed[i].sum();
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum[0] += hidden[i].value[lane];
  }
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
    if constexpr (kDrops) drop_octet(hidden[i], dropout, row_key, octet);
    if (octet < octets) store_octet<kWide>(static_cast<T*>(a.out) + row * a.width, octet, width, hidden[i]);
  }
  if (thread == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
    if (!summands.is_in_range && a.errors != nullptr) *a.errors = 1;
  }
}

// What the backward reads of a row.
template <class T, int kOctets>
struct BackwardRow {
  Packed<T> grad[kOctets];
  PackedSummands<T> summands[kOctets];
  float mean, rstd;
  int32_t key;
};

// The least that nvcc does not spill at, or nearly: the fewer, the more warps wait for memory at once.
template <class T, int kThreads, int kOctets, bool kWide, bool kDrops>
constexpr int kBackwardRegisters = kOctets > 1 || !kWide      ? 168
                                   : kWords<T> > 4            ? 128
                                   : kDrops || kThreads > 128 ? 96
                                                              : 80;

// Grid: parts of the rows. kThreads threads own a row, kGroups of them share a part: they go through its rows
// by turns, write what flows back to each, and hold the sums for weight and bias.
template <class T, int kThreads, int kGroups, int kOctets, bool kWide, bool kDrops>
__global__ void __launch_bounds__(
    kThreads* kGroups, resident(kThreads* kGroups, kBackwardRegisters<T, kThreads, kOctets, kWide, kDrops>))
    backward_kernel(EmbedTokensBackward a, float inverse_width) {
  // Two rows' worth: a thread may begin the next row while another still reads the sums of this one.
  __shared__ float memory[2][kThreads * kGroups / kWarp][2];
  const int thread = threadIdx.x % kThreads, group = threadIdx.x / kThreads;
  const Dropout dropout = Dropout::of(a.dropout);
  const int width = int(a.width), octets = octets_of(width);

  const int first = int(first_row_of_part(blockIdx.x, a.parts, a.rows));
  const int last = int(first_row_of_part(blockIdx.x + 1, a.parts, a.rows));
  const auto load = [&](int64_t row) {
    BackwardRow<T, kOctets> out;
    const bool row_there = row < last;
    const Summands<T> summands = row_there ? summands_of<T>(a, row) : Summands<T>{nullptr, nullptr, true};
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      const bool there = row_there && octet < octets;
      out.grad[i] =
          fetch_octet<kWide>(static_cast<const T*>(a.grad) + row * a.grad_stride, octet, width, there);
      out.summands[i] = fetch_summands<kWide>(summands, octet, width, there);
    }
    // Of no row, nothing counts: its gradient is 0.
    out.mean = row_there ? a.mean[row] : 0.0f;
    out.rstd = row_there ? a.rstd[row] : 0.0f;
    out.key = kDrops && row_there ? a.dropout.row_keys[row] : 0;
    return out;
  };

  BackwardRow<T, kOctets> next = load(first + group);
  Octet sums[kEmbedSums][kOctets];
#pragma unroll
  for (int kind = 0; kind < kEmbedSums; ++kind)
#pragma unroll
    for (int i = 0; i < kOctets; ++i) sums[kind][i] = zero_octet();

  int turn = 0;
  for (int turn_row = first; turn_row < last; turn_row += kGroups, turn ^= 1) {
    const int64_t row = turn_row + group;
    const BackwardRow<T, kOctets> own = next;
    // Read again for every row, out of the first-level cache: registers are scarcer.
    Packed<T> weight[kOctets];
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int octet = thread + i * kThreads;
      weight[i] = fetch_octet<kWide>(static_cast<const T*>(a.weight), octet, width, octet < octets);
    }
    Octet normal[kOctets], weighted[kOctets];
    float row_sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const Octet hidden = own.summands[i].sum(), factor = unpack(weight[i]);
      Octet grad = unpack(own.grad[i]);
      if constexpr (kDrops) drop_octet(grad, dropout, own.key, thread + i * kThreads);
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
      Octet gradient;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane)
        gradient.value[lane] = hidden_gradient(
            weighted[i].value[lane], mean_weighted, normal[i].value[lane], mean_product, own.rstd);
      if (row < last && octet < octets) store_octet<kWide>(a.dhidden + row * a.width, octet, width, gradient);
    }
  }
  store_part<kThreads, kGroups, kWide>(a, sums, thread, group, width, octets);
}

constexpr int kListWarps = 8;  // share the rows of a destination
constexpr int kListBatch = 4;  // rows of a warp that are under way at once

// Grid: who may own a destination × slices of 32 octets. The warps of a block take the owner's rows by turns,
// a thread an octet of each; then their sums are added in order.
template <class T, bool kWide>
__global__ void __launch_bounds__(kWarp* kListWarps) sum_lists_kernel(RowLists a) {
  __shared__ float others[kListWarps - 1][kLanes][kWarp];
  const int64_t owner = blockIdx.x, destination = a.owned(owner);
  if (destination < 0) return;
  const int lane_of_warp = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int width = int(a.width), octets = octets_of(width);
  const int octet = int(blockIdx.y) * kWarp + lane_of_warp;
  const int64_t turn = kListWarps * a.step();
  Octet sum = zero_octet();
  bool more = true;
  for (int64_t entry = owner + warp * a.step(); more; entry += kListBatch * turn) {
    Packed<float> rows[kListBatch];
#pragma unroll
    for (int i = 0; i < kListBatch; ++i) {
      const int64_t at = entry + i * turn;
      more = a.belongs(at, destination);  // once one does not, no later one does
      const int64_t row = more ? a.row_of(at) : 0;
      rows[i] = fetch_octet<kWide>(a.rows + row * a.width, octet, width, more && octet < octets);
    }
    // Four at a time: the fewer follow one another, the smaller the error.
    Octet first = unpack(rows[0]), second = unpack(rows[2]);
    add_to(first, unpack(rows[1]));
    add_to(second, unpack(rows[3]));
    add_to(first, second);
    add_to(sum, first);
  }
  if (warp > 0)
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) others[warp - 1][lane][lane_of_warp] = sum.value[lane];
  __syncthreads();
  if (warp > 0 || octet >= octets) return;
#pragma unroll
  for (int other = 0; other < kListWarps - 1; ++other)
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum.value[lane] += others[other][lane][lane_of_warp];
  store_octet<kWide>(static_cast<T*>(a.out) + destination * a.width, octet, width, sum);
}

template <class T>
bool is_table_wide(const Table& table) {
  return is_wide<T>(table.data, table.stride);
}

template <class T>
bool all_wide(const EmbedTokens& a) {
  return a.width % kLanes == 0 && is_table_wide<T>(a.queries) && is_table_wide<T>(a.words) &&
         is_table_wide<T>(a.positions) && is_wide<T>(a.weight, 0);
}

template <class T>
bool is_all_wide(const EmbedTokensForward& a) {
  return all_wide<T>(a) && is_wide<T>(a.bias, 0) && is_wide<T>(a.out, a.width);
}

template <class T>
bool is_all_wide(const EmbedTokensBackward& a) {
  return all_wide<T>(a) && is_wide<T>(a.grad, a.grad_stride) && is_wide<float>(a.dhidden, a.width) &&
         is_wide<float>(a.partials, a.width);
}

template <class T, int kThreads, int kOctets, bool kWide>
const char* run_forward(const EmbedTokensForward& a, void* stream) {
  constexpr int kRows = kForwardBlock / kThreads;
  const dim3 grid(unsigned((a.rows + kRows - 1) / kRows));
  const auto kernel = a.dropout.level != 0 ? forward_kernel<T, kThreads, kOctets, kWide, true>
                                           : forward_kernel<T, kThreads, kOctets, kWide, false>;
  return launch(kernel, grid, dim3(kForwardBlock), stream, a, 1.0f / float(a.width));
}

template <class T, int kThreads, int kGroups, int kOctets, bool kWide>
const char* run_backward(const EmbedTokensBackward& a, void* stream) {
  const auto kernel = a.dropout.level != 0 ? backward_kernel<T, kThreads, kGroups, kOctets, kWide, true>
                                           : backward_kernel<T, kThreads, kGroups, kOctets, kWide, false>;
  return launch(kernel, dim3(unsigned(a.parts)), dim3(kThreads * kGroups), stream, a, 1.0f / float(a.width));
}

template <class T>
const char* sum_lists(const RowLists& a, void* stream) {
  if (a.out == nullptr || a.owners() == 0) return nullptr;
  const dim3 grid(unsigned(a.owners()), unsigned((octets_of(a.width) + kWarp - 1) / kWarp));
  const bool wide = a.width % kLanes == 0 && is_wide<float>(a.rows, a.width) && is_wide<T>(a.out, a.width);
  return launch(
      wide ? sum_lists_kernel<T, true> : sum_lists_kernel<T, false>, grid, dim3(kWarp * kListWarps), stream,
      a);
}

}  // namespace

const char* embed_tokens_forward_cuda(const EmbedTokensForward& a, void* stream) {
  const char* error = nullptr;
  with_format(a.format, [&]<class T>() {
    with_forward_threads(octets_of(a.width), is_all_wide<T>(a), [&]<int kThreads, int kOctets, bool kWide>() {
      error = run_forward<T, kThreads, kOctets, kWide>(a, stream);
    });
  });
  return error;
}

const char* embed_tokens_backward_cuda(const EmbedTokensBackward& a, void* stream) {
  const char* error = nullptr;
  with_format(a.format, [&]<class T>() {
    const auto run = [&]<int kThreads, int kGroups, int kOctets, bool kWide>() {
      error = run_backward<T, kThreads, kGroups, kOctets, kWide>(a, stream);
    };
    if (a.parts > 0) with_backward_threads(octets_of(a.width), is_all_wide<T>(a), run);
    const PartSums sums{a.partials, a.parts, kEmbedSums, a.width, {a.sums[0], a.sums[1], nullptr}};
    if (error == nullptr) error = sum_parts<T>(sums, stream);
    for (const RowLists* lists : {&a.dqueries, &a.dwords, &a.dpositions})
      if (error == nullptr) error = sum_lists<T>(*lists, stream);
  });
  return error;
}

}  // namespace blip2_kernels
