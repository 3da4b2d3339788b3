// Argument checks of the ops. A message names the op, the argument, what was expected and what
// came: "cora::linear_lowrank: scale must have dtype float32, got float64".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace cora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

template <typename... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "cora::" << op << ": ";
  ((message << args), ...);
  throw std::runtime_error(message.str());
}

#define CORA_CHECK(op, condition, ...)                 \
  do {                                                 \
    if (!(condition)) ::cora::fail((op), __VA_ARGS__); \
  } while (0)

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}
std::string shape_text(const Tensor& t);
std::string dtype_text(ScalarType dtype);

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype);
void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape);
void check_bits(const char* op, int64_t bits);
/// All tensors of a call lie on x's device.
void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x);

/// Scale and zero-point of a matrix [rows, cols]: both [R, G], R = 1 or rows, G divides cols.
struct QParamShape {
  int64_t rows;        // R
  int64_t groups;      // G
  int64_t group_size;  // cols / G
};
QParamShape check_qparams(const char* op, const Tensor& scale, const Tensor& zero_point, int64_t rows, int64_t cols);

/// Values, CPU only: scale finite and > 0, |zero_point| < 2^24.
void check_qparam_values(const char* op, const Tensor& scale, const Tensor& zero_point);

/// A packed weight uint8 [n, row_bytes(k, bits)] with its scale and zero_point; returns the latter's shape.
QParamShape check_packed(const char* op, const char* name, const Tensor& packed, const Tensor& scale,
                         const Tensor& zero_point, int64_t bits, int64_t k);

/// An image [batch, channels, H, W], dense and channels last; sizes of 1 may have any stride.
bool is_channels_last(const Tensor& t);

/// The shape of codes uint8 [..., k] when packed, and of packed bytes when unpacked.
std::vector<int64_t> packed_shape(const char* op, const Tensor& codes, int64_t bits);
std::vector<int64_t> unpacked_shape(const char* op, const Tensor& packed, int64_t bits, int64_t k);

/// The product of all sizes but the last.
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty({shape.data(), shape.size()}, dtype);
}
inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}
template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

/// Calls f(begin, end) on ranges of [0, count) on torch's threads; torch.set_num_threads rules.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, f);
}

}  // namespace cora
