// Sums over rows that are the same in every run: rows fall into parts by their number alone, or into lists by
// where they go; each part or list is added up by one owner, and the parts are added in order. No atomics,
// whatever the number of threads.
#pragma once

#include "number.h"

namespace blip2_kernels {

// Rows that an operator takes. CUDA kernels go through the rows of a part in ints by steps of up to four, whose last
// ends behind the rows: 64 bits, or unsigned ones, cost registers.
constexpr int64_t kMaxRows = (int64_t(1) << 31) - 8;

HOST_DEVICE int64_t first_row_of_part(int64_t part, int64_t parts, int64_t rows) {
  const int64_t each = rows / parts, left = rows % parts;
  return part * each + (part < left ? part : left);
}

// Rows that are added up by destination. With keys, entry e of the list of all is row order[e], which goes to
// the destination keys[order[e]], and entries of one destination follow one another: the first of them owns
// it. Where no entry goes `out` is left as it is. Without keys row r goes to r % destinations, and all of
// `out` is written.
struct RowLists {
  const float* rows;  // [count, width]
  int64_t count;
  int64_t width;
  const int64_t* keys;   // [count], or null
  const int64_t* order;  // [count] beside keys
  int64_t left_out;      // a destination that gets nothing, -1 for none
  int64_t destinations;
  void* out;  // [destinations, width]; null where nobody asks

  // How many may own a destination.
  HOST_DEVICE int64_t owners() const { return keys ? count : destinations; }

  // From an entry of a list to the next one.
  HOST_DEVICE int64_t step() const { return keys ? 1 : destinations; }

  HOST_DEVICE int64_t row_of(int64_t entry) const {
    if (!keys) return entry;
    const int64_t row = order[entry];
    return row < 0 ? 0 : row < count ? row : count - 1;
  }

  // The destination that starts with this entry; -1 where none does.
  HOST_DEVICE int64_t owned(int64_t entry) const {
    if (!keys) return entry;
    const int64_t key = keys[row_of(entry)];
    const bool is_first = entry == 0 || keys[row_of(entry - 1)] != key;
    return is_first && key >= 0 && key < destinations && key != left_out ? key : -1;
  }

  HOST_DEVICE bool belongs(int64_t entry, int64_t destination) const {
    return entry < count && (!keys || keys[row_of(entry)] == destination);
  }
};

}  // namespace blip2_kernels
