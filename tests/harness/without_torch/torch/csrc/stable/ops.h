// What the loops for the CPU need of torch, in one thread and without it.
#pragma once

#include <cstdint>

namespace torch::stable {

template <class Body>
void parallel_for(int64_t first, int64_t last, int64_t, const Body& body) {
  body(first, last);
}

}  // namespace torch::stable
