// Dropout of hidden elements by Philox 4x32-10. The contract is that of blip2_kernels/ops/philox.py: one call
// serves eight neighbouring channels of a row, whose names are its counter.
#pragma once

#include "platform.h"

namespace blip2_kernels {

constexpr int kLanes = 8;

// What dropout needs to know, as an operator gets it.
struct DropoutArguments {
  uint32_t level = 0;                 // 16-bit numbers below it are dropped; 0 drops nothing
  float scale = 1;                    // factor of what is kept
  uint32_t place = 0;                 // layer * 8 + site
  const int64_t* key = nullptr;       // the step's, where the tensors are
  const int32_t* row_keys = nullptr;  // one a row
};

// The same with the key read.
struct Dropout {
  uint32_t level;
  float scale;
  uint32_t place;
  uint32_t key[2];

  HOST_DEVICE static Dropout of(const DropoutArguments& given) {
    const uint64_t key = given.level ? uint64_t(*given.key) : 0;
    return {given.level, given.scale, given.place, {uint32_t(key), uint32_t(key >> 32)}};
  }
};

struct PhiloxWords {
  uint32_t word[4];
};

HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return uint32_t((uint64_t(a) * b) >> 32);
#endif
}

// Random words of channels 8 * group … 8 * group + 7 of the row with this key. Channel 8 * group + l has the
// low (l even) or high (l odd) half of word l / 2. Of an attention's probabilities there are those of a head,
// and the names of the rows attended to stand where channels do.
HOST_DEVICE PhiloxWords philox(const Dropout& dropout, uint32_t row_key, uint32_t group, uint32_t head = 0) {
  uint32_t c0 = row_key, c1 = group, c2 = head, c3 = dropout.place;
  uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = high_product(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

HOST_DEVICE uint16_t random_of_lane(const PhiloxWords& words, int lane) {
  return uint16_t(words.word[lane >> 1] >> ((lane & 1) * 16));
}

// Selected, not multiplied by 0: what is dropped may be infinite.
HOST_DEVICE float drop(const Dropout& dropout, uint16_t random, float value) {
  return random >= dropout.level ? rounded_product(value, dropout.scale) : 0.0f;
}

}  // namespace blip2_kernels
