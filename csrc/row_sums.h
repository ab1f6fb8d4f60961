// Sums over rows that are the same in every run: rows fall into parts by their number alone, each part is added
// up by one owner, and the parts are added in order. No atomics, whatever the number of threads.
#pragma once

#include "number.h"

namespace blip2_kernels {

HOST_DEVICE int64_t first_row_of_part(int64_t part, int64_t parts, int64_t rows) {
  const int64_t each = rows / parts, left = rows % parts;
  return part * each + (part < left ? part : left);
}

}  // namespace blip2_kernels
