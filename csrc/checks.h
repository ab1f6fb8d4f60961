// Checks of tensors before anything is launched. An error names the argument, what was expected and what
// came. Text is joined from strings, never through a stream: libc10 exports constructors of string streams,
// and where the C++ runtime is linked in statically a stream would be made by one runtime and written to by
// another, which crashes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "number.h"
#include "philox.h"
#include "row_sums.h"

namespace blip2_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

[[noreturn]] inline void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw std::runtime_error(std::string(name) + ": expected " + expected + ", got " + got);
}

inline std::string describe(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "dtype " + std::to_string(int(dtype));
  }
}

inline std::string describe(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

inline std::string describe(const Tensor& tensor) {
  std::string sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes += (i ? ", " : "") + std::to_string(tensor.size(i));
  const char* place = tensor.is_cpu() ? "" : " on another device than the CPU";
  return describe(tensor.scalar_type()) + " [" + sizes + "]" + place;
}

inline void check_tensor(
    const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes,
    const Tensor& beside) {
  bool fits = tensor.scalar_type() == dtype && tensor.dim() == int64_t(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) fits = fits && tensor.size(i++) == size;
  if (!fits) refuse(name, describe(dtype) + " " + describe(sizes), describe(tensor));
  if (tensor.is_cpu() != beside.is_cpu() || tensor.get_device_index() != beside.get_device_index())
    refuse(name, "a tensor on the device of the others", describe(tensor));
}

// The tensor that the others follow, of a floating dtype and `shape`, with channels last.
inline void check_leader(
    const char* name, const Tensor& tensor, const char* shape, int64_t dim, int64_t max_width) {
  const ScalarType dtype = tensor.scalar_type();
  const bool floats =
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  if (!floats || tensor.dim() != dim)
    refuse(name, std::string("float32, float16 or bfloat16 ") + shape, describe(tensor));
  if (tensor.size(dim - 1) < 1 || tensor.size(dim - 1) > max_width)
    refuse(name, "a width from 1 to " + std::to_string(max_width), describe(tensor));
  if (!tensor.is_cpu() && !tensor.is_cuda()) refuse(name, "a tensor on the CPU or on CUDA", describe(tensor));
}

inline void check_rows(const char* name, const Tensor& tensor, int64_t max_width) {
  check_leader(name, tensor, "[rows, width]", 2, max_width);
  if (tensor.size(0) > kMaxRows) refuse(name, "at most 2^31 - 8 rows", describe(tensor));
}

inline Format format_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return Format::FLOAT16;
    case ScalarType::BFloat16: return Format::BFLOAT16;
    default: return Format::FLOAT32;
  }
}

inline void check_eps(double eps) {
  if (!(eps >= 0 && eps < INFINITY)) refuse("eps", "a finite number >= 0", std::to_string(eps));
}

// The arguments of dropout for so many rows beside a tensor; all but its probability are optional where that
// is 0.
inline DropoutArguments check_dropout(
    double p, const Optional& key, const Optional& row_keys, int64_t place, int64_t rows,
    const Tensor& beside) {
  if (!(p >= 0 && p < 1)) refuse("dropout", "a number in [0, 1)", std::to_string(p));
  if (place < 0 || place >= int64_t(1) << 32) refuse("place", "an int in [0, 2^32)", std::to_string(place));
  if (p == 0) return {};
  if (!key) refuse("dropout_key", "int64 [] where dropout > 0", "None");
  if (!row_keys) refuse("row_keys", "int32 [rows] where dropout > 0", "None");
  check_tensor("dropout_key", *key, ScalarType::Long, {}, beside);
  check_tensor("row_keys", *row_keys, ScalarType::Int, {rows}, beside);
  if (rows > 1 && row_keys->stride(0) != 1)
    refuse("row_keys", "adjacent values", "a stride of " + std::to_string(row_keys->stride(0)));
  constexpr double levels = 1 << 16;
  const double level = std::min(std::nearbyint(p * levels), levels - 1);
  DropoutArguments arguments;
  arguments.level = uint32_t(level);
  arguments.scale = float(levels / (levels - level));
  arguments.place = uint32_t(place);
  arguments.key = static_cast<const int64_t*>(key->const_data_ptr());
  arguments.row_keys = static_cast<const int32_t*>(row_keys->const_data_ptr());
  return arguments;
}

}  // namespace blip2_kernels
