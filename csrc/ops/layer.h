// What linear and 2-d convolution on a prepared layer share. A linear layer is the convolution of a
// 1x1 image by a 1x1 kernel, so there is one driver.
//
//   prepare_layer.cpp  the packed layout -> a prepared layer
//   layer.cpp          the order of the steps, the output
//   layer_input.cpp    x -> padded, channels last, and codes where the input is quantised
//   tile_rows.h        which positions make up a tile, and where their rows of x lie
//   layer_tiles.cpp    tiles of output positions by panels of output channels
//   layer_gemv.cpp     a linear layer of a few rows
//   depthwise.cpp      one input and one output channel a group
#pragma once

#include "ops/prepared.h"

namespace cora {

Tensor prepare_layer(const LayerArgs& args, const Window& window);
Tensor run_layer(const Tensor& x, const Layer& layer, const RunArgs& args);

// --- Between the steps ------------------------------------------------------------------------

/// x as the kernels read it: padded and channels last; X is float, uint8_t codes, or Bf16 planes.
template <typename X>
struct LayerInput {
  const X* x;                  // the first output position's first element
  Buffer<X> storage;           // empty when x is the caller's own tensor
  Buffer<float> scale;         // codes: [batch]
  Buffer<int32_t> zero;        // codes: [batch]
  bool uniform = true;         // one scale and zero-point for the batch
  int64_t image, line, pixel;  // strides in elements
  int planes = 1;              // Bf16
  int64_t plane = 0;           // stride of planes
  bool in_range = true;        // Bf16: products of every element are those of floats
  int64_t absent[2] = {0, 0};  // the padding is not there: x is the first pixel (depthwise, floats)
};

/// The channels-last destination: element (image, y, x, channel 0) and what happens on the way there.
struct LayerOutput {
  cpu::Epilogue epilogue;  // its add and y point at position (0, 0, 0)
  int64_t image, line, pixel;
  int64_t add_image, add_line, add_pixel;
};

template <typename X>
LayerInput<X> prepare_input(const Tensor& x, const Layer& layer, const Window& window, const RunArgs& args, bool nchw);
/// x, float32 in memory, as so many planes.
LayerInput<cpu::Bf16> prepare_planes(const Tensor& x, const Layer& layer, const Window& window, int planes, bool nchw);

template <typename X>
void run_tiles(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output);
/// Few rows of a linear layer.
template <typename X>
void run_gemv(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output);
template <typename X>
void run_depthwise(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output);

struct LayerSource;
void plan_depthwise(LayerHeader& header, const LayerSource& source);
void fill_depthwise(const LayerHeader& header, const LayerSource& source, uint8_t* blob);

/// Raw pointers to what a layer is prepared from.
struct LayerSource {
  const uint8_t* packed;
  const float* scale;
  const int32_t* zero_point;
  const int8_t* a_codes;
  const float *a_float, *a_scale;
  const int8_t* b_codes;
  const float *b_float, *bias;
  int64_t row_stride;
  QParamShape q;

  int64_t first_scale(int64_t row) const { return q.rows == 1 ? 0 : row * q.groups; }
};

}  // namespace cora
