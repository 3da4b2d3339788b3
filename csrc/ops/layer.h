// A packed layer with its adapter: what linear_lowrank and conv2d_lowrank share. A linear layer is the
// convolution of a 1x1 image by a 1x1 kernel, so there is one driver.
//
//   layer.cpp        checks; the order of the passes
//   layer_input.cpp  x -> padded, channels-last, and int8 codes where the input is quantised
//   layer_tiles.cpp  weights -> panels; tiles and dot products; the epilogue
//   depthwise.cpp    one input and one output channel a group
#pragma once

#include "bits.h"
#include "check.h"
#include "cpu/kernels.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace cora {

/// The op's arguments. After check_layer() optional tensors are as their names say in cora/ops.py.
struct LayerArgs {
  const char* op;
  Tensor x, weight, scale, zero_point;
  int64_t bits;
  OptTensor a, b, adapter_scale, bias, x_scale, x_zero_point;
  int64_t x_bits;
};

/// Geometry; [0] is vertical, [1] horizontal.
struct Window {
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

/// Checks every argument of the layer against n, k, groups; x's own shape is the caller's business.
void check_layer(const LayerArgs& args, int64_t n, int64_t k, int64_t groups);

/// y float32 [rows, n], channels last. `nchw`: x's channels are its slow dimension.
void run_layer(const LayerArgs& args, const Window& window, bool nchw, float* y);

// --- Between the passes -----------------------------------------------------------------------

/// 64-byte aligned, uninitialised, with 64 bytes to spare: kernels may read a little past the end.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 191) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

/// x as the kernels read it: padded and channels last; T is float, or int8 (code - 128).
template <typename T>
struct LayerInput {
  const T* x;
  Buffer<T> storage;           // empty when x is the caller's own tensor
  Buffer<float> scale;         // int8: [batch]
  Buffer<int32_t> zero;        // int8: [batch], zero-point - 128
  int64_t image, line, pixel;  // strides in elements

  /// Offset of output position m's first tap.
  int64_t offset(const Window& w, int64_t m) const {
    const int64_t b = m / w.pixels(), rest = m % w.pixels();
    return b * image + rest / w.out(1) * w.stride[0] * line + rest % w.out(1) * w.stride[1] * pixel;
  }
};

template <typename T>
LayerInput<T> prepare_input(const LayerArgs& args, const Window& window, bool nchw);

/// The weight and adapter as raw pointers.
struct LayerWeights {
  const uint8_t* packed;
  const float* scale;
  const int32_t* zero_point;
  const float* bias;      // or null
  const int8_t* a_codes;  // [groups * rank, k], or null
  const float* a_float;   // the same as floats, or null
  const float* a_scale;   // [groups * rank] with a_codes
  const float* b;         // [n, rank]
  int64_t n, k, rank, row_stride;
  int bits;
  QParamShape q;

  /// Index of row r's first scale.
  int64_t first_scale(int64_t r) const { return q.rows == 1 ? 0 : r * q.groups; }
};

template <typename T>
void run_tiles(const LayerWeights& weights, const Window& window, const LayerInput<T>& input, float* y);
template <typename T>
void run_depthwise(const LayerWeights& weights, const Window& window, const LayerInput<T>& input, float* y);

/// True when float(code - zero_point) * (x - zx) sums over `count` terms fit int32.
bool fits_int32(const LayerWeights& weights, int64_t count);

}  // namespace cora
