// packed_attention on the CPU: a sample and head at a time, whose keys and some of whose rows lie in a core's
// caches as fp32.
#include "packed_attention.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "cpu_rows.h"
#include "exp2.h"
#include "small_product.h"

namespace blip2_kernels {
namespace {

constexpr int kBlockRows = 36;  // attending rows at a time
constexpr float kLog2E = 1.4426950408889634f;

int64_t rounded_up(int64_t size) { return (size + kTileColumns - 1) / kTileColumns * kTileColumns; }

// Sizes of the matrices that a sample and head is worked on in.
struct Sizes {
  int64_t keys;      // columns of a matrix with one for each key
  int64_t channels;  // columns of a matrix with one for each channel
  int64_t most_keys, head_dim;

  explicit Sizes(const PackedAttention& a)
      // A row's keys begin anywhere, and its last tile ends behind them.
      : keys(rounded_up(a.most_keys) + kTileColumns),
        channels(rounded_up(a.head_dim)),
        most_keys(a.most_keys),
        head_dim(a.head_dim) {}

  int64_t by_key() const { return most_keys * channels; }
  int64_t by_channel() const { return head_dim * keys; }
  int64_t rows_of_channels() const { return kBlockRows * channels; }
  int64_t rows_of_keys() const { return kBlockRows * keys; }
};

// A thread's matrices: zeros at first, each in memory of its own, at the start of a cache line.
class Room {
 public:
  float* take(int64_t floats) {
    float* taken = static_cast<float*>(::operator new(floats * sizeof(float), kLine));
    memory_.emplace_back(taken);
    std::fill(taken, taken + floats, 0.0f);
    return taken;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* taken) const { ::operator delete(taken, kLine); }
  };
  std::vector<std::unique_ptr<float, Free>> memory_;
};

// The random numbers of a row's probabilities. Keys that follow one another and whose names are a group of
// eight are a run, and share a call.
struct Draws {
  std::unique_ptr<PhiloxWords[]> words;  // of each run
  std::unique_ptr<uint32_t[]> groups;    // of each run
  std::unique_ptr<int32_t[]> lanes;      // of each key: kLanes * its run + its lane

  explicit Draws(int64_t most_keys)
      : words(new PhiloxWords[most_keys]), groups(new uint32_t[most_keys]), lanes(new int32_t[most_keys]) {}

  void name_keys(const PackedAttention& a, int64_t sample) {
    int runs = 0, key = 0;
    for (int64_t i = 0; i < a.spans_each; ++i) {
      const KeySpan span = a.spans_of(sample)[i];
      for (int32_t row = span.first; row < span.first + span.count; ++row, ++key) {
        const uint32_t name = uint32_t(a.kv_row_keys[row]);
        if (!runs || groups[runs - 1] != name / kLanes) groups[runs++] = name / kLanes;
        lanes[key] = int32_t((runs - 1) * kLanes + name % kLanes);
      }
    }
  }

  // The factors of a row's probabilities, for `count` keys from `first` on.
  HOST_DEVICE void factors(
      const Dropout& dropout, int32_t row_key, uint32_t head, int first, int count, float* __restrict out) {
    if (!count) return;
    const int32_t* __restrict lane = lanes.get() + first;
    const int end = lane[count - 1] / kLanes + 1;
#pragma omp simd
    for (int run = lane[0] / kLanes; run < end; ++run)
      words[run] = philox(dropout, uint32_t(row_key), groups[run], head);
    for (int i = 0; i < count; ++i) {
      const uint16_t random = random_of_lane(words[lane[i] / kLanes], lane[i] % kLanes);
      out[i] = random >= dropout.level ? dropout.scale : 0.0f;
    }
  }
};

// Rows of one head as fp32, [count, channels].
template <class T>
HOST_DEVICE void load_rows(
    const PackedRows& rows, int64_t head, int64_t first, int64_t count, int64_t head_dim, int64_t channels,
    float* __restrict at) {
  for (int64_t i = 0; i < count; ++i) {
    const T* __restrict from =
        static_cast<const T*>(rows.data) + (first + i) * rows.row_stride + head * rows.head_stride;
#pragma omp simd
    for (int64_t c = 0; c < head_dim; ++c) at[i * channels + c] = to_float(from[c]);
  }
}

template <class T>
HOST_DEVICE void store_rows(
    const float* __restrict from, int64_t heads, int64_t head, int64_t first, int64_t count, int64_t head_dim,
    int64_t channels, void* rows) {
  for (int64_t i = 0; i < count; ++i) {
    T* __restrict out = static_cast<T*>(rows) + ((first + i) * heads + head) * head_dim;
#pragma omp simd
    for (int64_t c = 0; c < head_dim; ++c) out[c] = from_float<T>(from[i * channels + c]);
  }
}

// out [columns, rows] of in [rows, columns].
HOST_DEVICE void transpose(
    const float* __restrict in, int64_t in_row, int64_t rows, int64_t columns, float* __restrict out,
    int64_t out_row) {
  constexpr int64_t kSide = 8;
  for (int64_t r = 0; r < rows; r += kSide)
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t last = std::min(r + kSide, rows);
      for (int64_t i = r; i < last; ++i) out[c * out_row + i] = in[i * in_row + c];
    }
}

// A row's scores become its probabilities: of `visible` keys, 0 from there to `columns`.
HOST_DEVICE void softmax(float* __restrict row, int visible, int columns, float scale) {
  float most = -INFINITY;
  int unordered = 0;
#pragma omp simd reduction(max : most) reduction(| : unordered)
  for (int i = 0; i < visible; ++i) {
    row[i] *= scale;
    most = row[i] > most ? row[i] : most;
    unordered |= !(row[i] < INFINITY);  // infinite or NaN
  }
  // A score that is infinite makes the row NaN, as a softmax does.
  if (unordered) most = NAN;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < visible; ++i) {
    row[i] = exp2_of_negative(row[i] - most);
    sum += row[i];
  }
  const float share = unordered ? NAN : 1.0f / sum;
#pragma omp simd
  for (int i = 0; i < visible; ++i) row[i] *= share;
  for (int i = visible; i < columns; ++i) row[i] = 0.0f;
}

// What both directions do with a sample, a head and a block of its rows.
template <bool kDrops, class T>
struct Work {
  const PackedAttention& a;
  const Sizes sizes;
  const Dropout dropout;
  Room room;
  Draws draws;
  float *keys, *keys_across, *values, *rows, *probabilities, *factors;

  explicit Work(const PackedAttention& a)
      : a(a),
        sizes(a),
        dropout(Dropout::of(a.dropout)),
        draws(kDrops ? a.most_keys : 0),
        keys(room.take(sizes.by_key())),
        keys_across(room.take(sizes.by_channel())),
        values(room.take(sizes.by_key())),
        rows(room.take(sizes.rows_of_channels())),
        probabilities(room.take(sizes.rows_of_keys())),
        factors(room.take(kDrops ? sizes.rows_of_keys() : 0)) {}

  // Loads the keys and values of a sample; how many there are.
  HOST_DEVICE int load(int64_t sample, int64_t head) {
    int64_t count = 0;
    for (int64_t i = 0; i < a.spans_each; ++i) {
      const KeySpan span = a.spans_of(sample)[i];
      const int64_t at = count * sizes.channels;
      load_rows<T>(a.k, head, span.first, span.count, a.head_dim, sizes.channels, keys + at);
      load_rows<T>(a.v, head, span.first, span.count, a.head_dim, sizes.channels, values + at);
      count += span.count;
    }
    transpose(keys, sizes.channels, count, a.head_dim, keys_across, sizes.keys);
    return int(count);
  }

  // Probabilities of rows [first, first + count), and with dropout the factors of each; how many keys any of
  // them attends to.
  HOST_DEVICE int attend(int64_t head, int64_t first, int count, int first_key) {
    int most = 0;
    for (int i = 0; i < count; ++i) most = std::max<int>(most, a.visible[first + i]);
    load_rows<T>(a.q, head, first, count, a.head_dim, sizes.channels, rows);
    product<false>(
        {rows, sizes.channels}, keys_across + first_key, sizes.keys, count, int(a.head_dim), most,
        probabilities, sizes.keys);
    for (int i = 0; i < count; ++i) {
      softmax(probabilities + i * sizes.keys, a.visible[first + i], most, a.scale * kLog2E);
      if constexpr (kDrops)
        draws.factors(
            dropout, a.dropout.row_keys[first + i], uint32_t(head), first_key, most,
            factors + i * sizes.keys);
    }
    return most;
  }

  // Calls block(first row, rows, first key) for the rows of a sample, not many at a time.
  template <class Block>
  HOST_DEVICE void blocks(int64_t sample, const Block& block) {
    for (int64_t i = 0; i < a.parts_each; ++i) {
      const RowPart part = a.parts_of(sample)[i];
      for (int done = 0; done < part.count; done += kBlockRows)
        block(int64_t(part.first) + done, std::min<int>(kBlockRows, part.count - done), int(part.first_key));
    }
  }

  // Sample and head of a number; the random numbers go with the sample.
  HOST_DEVICE int64_t sample_of(int64_t number) {
    const int64_t sample = number / a.heads;
    if constexpr (kDrops) draws.name_keys(a, sample);
    return sample;
  }
};

template <bool kDrops, class T>
struct Forward : Work<kDrops, T> {
  const PackedAttentionForward& given;
  float* out;

  explicit Forward(const PackedAttentionForward& given)
      : Work<kDrops, T>(given), given(given), out(this->room.take(this->sizes.rows_of_channels())) {}

  HOST_DEVICE void run(int64_t number) {
    const Sizes& sizes = this->sizes;
    const int64_t sample = this->sample_of(number), head = number % given.heads;
    this->load(sample, head);
    this->blocks(sample, [&](int64_t first, int count, int first_key) ALWAYS_INLINE {
      const int most = this->attend(head, first, count, first_key);
      float* __restrict probabilities = this->probabilities;
      if constexpr (kDrops)
        for (int i = 0; i < count; ++i)
#pragma omp simd
          for (int key = 0; key < most; ++key)
            probabilities[i * sizes.keys + key] =
                rounded_product(probabilities[i * sizes.keys + key], this->factors[i * sizes.keys + key]);
      product<false>(
          {probabilities, sizes.keys}, this->values + first_key * sizes.channels, sizes.channels, count, most,
          int(given.head_dim), out, sizes.channels);
      store_rows<T>(out, given.heads, head, first, count, given.head_dim, sizes.channels, given.out);
    });
  }
};

template <bool kDrops, class T>
struct Backward : Work<kDrops, T> {
  const PackedAttentionBackward& given;
  float *values_across, *grad, *dprobabilities, *dropped, *drows, *dkeys, *dvalues;

  explicit Backward(const PackedAttentionBackward& given)
      : Work<kDrops, T>(given),
        given(given),
        values_across(this->room.take(this->sizes.by_channel())),
        grad(this->room.take(this->sizes.rows_of_channels())),
        dprobabilities(this->room.take(this->sizes.rows_of_keys())),
        dropped(kDrops ? this->room.take(this->sizes.rows_of_keys()) : this->probabilities),
        drows(this->room.take(this->sizes.rows_of_channels())),
        dkeys(this->room.take(this->sizes.by_key())),
        dvalues(this->room.take(this->sizes.by_key())) {}

  // The gradient of a row's scores, in place of that of its probabilities.
  HOST_DEVICE void differentiate(int i, int most) {
    const int64_t at = i * this->sizes.keys;
    const float* __restrict probability = this->probabilities + at;
    const float* __restrict factor = this->factors + at;
    float* __restrict gradient = dprobabilities + at;
    float* __restrict kept = dropped + at;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int key = 0; key < most; ++key) {
      if constexpr (kDrops) {
        gradient[key] *= factor[key];
        kept[key] = rounded_product(probability[key], factor[key]);
      }
      sum += gradient[key] * probability[key];
    }
#pragma omp simd
    for (int key = 0; key < most; ++key)
      gradient[key] = (gradient[key] - sum) * probability[key] * given.scale;
  }

  HOST_DEVICE void run(int64_t number) {
    const Sizes& sizes = this->sizes;
    const int64_t sample = this->sample_of(number), head = number % given.heads;
    const int head_dim = int(given.head_dim), keys = this->load(sample, head);
    transpose(this->values, sizes.channels, keys, head_dim, values_across, sizes.keys);
    std::fill(dkeys, dkeys + keys * sizes.channels, 0.0f);
    std::fill(dvalues, dvalues + keys * sizes.channels, 0.0f);
    this->blocks(sample, [&](int64_t first, int count, int first_key) ALWAYS_INLINE {
      const int most = this->attend(head, first, count, first_key);
      const int64_t at = first_key * sizes.channels;
      load_rows<T>(given.grad, head, first, count, head_dim, sizes.channels, grad);
      product<false>(
          {grad, sizes.channels}, values_across + first_key, sizes.keys, count, head_dim, most,
          dprobabilities, sizes.keys);
      for (int i = 0; i < count; ++i) differentiate(i, most);
      product<true>(
          Strided{dropped, sizes.keys}.transposed(), grad, sizes.channels, most, count, head_dim,
          dvalues + at, sizes.channels);
      product<true>(
          Strided{dprobabilities, sizes.keys}.transposed(), this->rows, sizes.channels, most, count, head_dim,
          dkeys + at, sizes.channels);
      product<false>(
          {dprobabilities, sizes.keys}, this->keys + at, sizes.channels, count, most, head_dim, drows,
          sizes.channels);
      store_rows<T>(drows, given.heads, head, first, count, head_dim, sizes.channels, given.dq);
    });
    int64_t done = 0;
    for (int64_t i = 0; i < given.spans_each; ++i) {
      const KeySpan span = given.spans_of(sample)[i];
      const int64_t at = done * sizes.channels;
      store_rows<T>(
          dkeys + at, given.heads, head, span.first, span.count, head_dim, sizes.channels, given.dk);
      store_rows<T>(
          dvalues + at, given.heads, head, span.first, span.count, head_dim, sizes.channels, given.dv);
      done += span.count;
    }
  }
};

// Runs all samples and heads in a direction.
template <template <bool, class> class Direction, class Arguments>
void run(const Arguments& a) {
  const int64_t each = a.pairs / std::max<int64_t>(a.samples, 1) * a.head_dim;
  const auto with_dropout = [&]<bool kDrops>() {
    with_format(a.format, [&]<class T>() {
      in_parallel(a.samples * a.heads, each, [&](int64_t first, int64_t last) {
        Direction<kDrops, T> work(a);
        run_for_this_processor([&]() ALWAYS_INLINE {
          for (int64_t number = first; number < last; ++number) work.run(number);
        });
      });
    });
  };
  a.dropout.level ? with_dropout.template operator()<true>() : with_dropout.template operator()<false>();
}

}  // namespace

void packed_attention_cpu(const PackedAttentionForward& arguments) { run<Forward>(arguments); }

void packed_attention_backward_cpu(const PackedAttentionBackward& arguments) { run<Backward>(arguments); }

}  // namespace blip2_kernels
