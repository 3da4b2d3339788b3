// Argument checks of the ops. A message names the op, the argument, what was expected and what
// came: "cora::linear_lowrank: scale must have dtype float32, got float64".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
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
void check_float(const char* op, const char* name, const Tensor& t);
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

/// Numbers of a quantizer: a scale is finite and > 0 as float32, a code 0..top.
void check_scale(const char* op, const char* name, double scale);
void check_code(const char* op, const char* name, int64_t code, int64_t top);

/// Values, CPU only: scale finite and > 0, |zero_point| < 2^24.
void check_qparam_values(const char* op, const Tensor& scale, const Tensor& zero_point);

/// A packed weight uint8 [n, row_bytes(k, bits)] with its scale and zero_point; returns the latter's shape.
QParamShape check_packed(const char* op, const char* name, const Tensor& packed, const Tensor& scale,
                         const Tensor& zero_point, int64_t bits, int64_t k);

/// What dequantize_activation and quantize_activation take.
void check_activation(const char* op, const char* name, const Tensor& t, double scale, int64_t zero_point, int64_t top,
                      int64_t halo);

/// An image [batch, channels, H, W], dense and channels last; sizes of 1 may have any stride.
bool is_channels_last(const Tensor& t);

/// Whether what is computed from an image comes out channels last: of one channel or one pixel, which is both
/// layouts at once, the strides tell, as they do in torch.
bool prefers_channels_last(const Tensor& t);

/// The shape of codes uint8 [..., k] when packed, and of packed bytes when unpacked.
std::vector<int64_t> packed_shape(const char* op, const Tensor& codes, int64_t bits);
std::vector<int64_t> unpacked_shape(const char* op, const Tensor& packed, int64_t bits, int64_t k);

// --- Layers: what their drivers on every device take ---------------------------------------------

/// Geometry; [0] is vertical, [1] horizontal. A linear layer is the convolution of 1x1 images by a 1x1 kernel.
struct Window {
  bool linear;
  int64_t batch, channels, size[2];
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t groups = 1;

  int64_t reach(int d) const { return dilation[d] * (kernel[d] - 1) + 1; }
  int64_t padded(int d) const { return size[d] + 2 * padding[d]; }
  int64_t out(int d) const { return (padded(d) - reach(d)) / stride[d] + 1; }
  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t group_channels() const { return channels / groups; }
  int64_t k() const { return group_channels() * taps(); }
  int64_t pixels() const { return out(0) * out(1); }
  int64_t rows() const { return batch * pixels(); }  // M: output positions
};

/// A packed layer's operands, as in cora/ops/packed_layers.py.
struct LayerArgs {
  const char* op;
  Tensor weight, scale, zero_point;
  int64_t bits;
  OptTensor a, b, adapter_scale, bias;
};

/// How a layer is run: its input's quantizer and the epilogue.
struct RunArgs {
  const char* op;
  int64_t x_bits = 0;  // 0: float
  std::optional<double> x_scale;
  int64_t x_zero_point = 0;
  int64_t x_halo = 0;
  OptTensor add;
  double add_scale = 1;
  int64_t add_zero_point = 0, add_halo = 0;
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();  // clamp
  std::optional<double> out_scale;
  int64_t out_zero_point = 0, out_halo = 0;
  bool in_place = false;  // nobody reads add afterwards: codes may be written over it (CPU)
};

/// Two numbers each.
void check_window(const char* op, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

/// A layer's geometry, its batch and size left open; of a linear layer the pairs are not read.
Window make_window(const char* op, bool linear, int64_t channels, const std::vector<int64_t>& kernel_size,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups);

/// The channels of x: [..., channels] of a linear layer, [batch, channels, H, W] of a convolution.
int64_t channels_of(const char* op, const Tensor& x, bool linear);

/// A layer's operands; `name` is what the op calls the weight.
void check_operands(const char* name, const LayerArgs& args, const Window& window);

/// The input and its quantizer's tensors, of one element each, as linear_lowrank and conv2d_lowrank take them.
void check_input(const char* op, const Tensor& x, const OptTensor& x_scale, const OptTensor& x_zero_point,
                 int64_t x_bits);

/// A call of a layer of n outputs; returns the layer's window with x's batch and size.
Window check_run(const Tensor& x, Window layer, int64_t n, const RunArgs& args);

/// The shape of a layer's output with a border of `halo`.
std::vector<int64_t> output_shape(const Tensor& x, const Window& window, int64_t n, int64_t halo);

// --- Tensors --------------------------------------------------------------------------------------

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
