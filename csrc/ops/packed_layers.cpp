// The ops: prepare_layer and run_layer, and linear_lowrank and conv2d_lowrank, which are one after the other.
#include "ops/layer.h"

#include <algorithm>
#include <limits>

namespace cora {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check_pair(const char* op, const char* name, const std::vector<int64_t>& v, int64_t least) {
  CORA_CHECK(op, v.size() == 2, name, " must have 2 elements, got ", v.size());
  CORA_CHECK(op, v[0] >= least && v[1] >= least, name, " must be >= ", least, ", got [", v[0], ", ", v[1], "]");
}

/// The geometry of a convolution of `channels` channels (linear: kernel_size empty), its size left open.
Window make_window(const char* op, int64_t channels, const std::vector<int64_t>& kernel_size,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  Window window{};
  window.channels = channels;
  window.groups = groups;
  CORA_CHECK(op, groups >= 1 && channels % groups == 0, "groups must divide the ", channels, " channels, got ",
             groups);
  if (kernel_size.empty()) return window;
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  for (int d = 0; d < 2; ++d) {
    window.kernel[d] = kernel_size[d];
    window.stride[d] = stride[d];
    window.padding[d] = padding[d];
    window.dilation[d] = dilation[d];
  }
  return window;
}

/// What a fake kernel has to know of a layer: [n] (linear), or [n, kernel, stride, padding, dilation].
std::vector<int64_t> geometry_of(const LayerHeader& h) {
  if (h.linear) return {h.n};
  return {h.n,         h.kernel[0],  h.kernel[1],   h.stride[0],  h.stride[1],
          h.padding[0], h.padding[1], h.dilation[0], h.dilation[1]};
}

Tensor prepare(const LayerArgs& args, const Window& window, const char* name) {
  check_packed(args.op, name, args.weight, args.scale, args.zero_point, args.bits, window.k());
  const int64_t n = args.weight.size(0);
  CORA_CHECK(args.op, n % window.groups == 0, "groups must divide the ", n, " rows of ", name, ", got ",
             window.groups);
  check_layer(args, n, window.k(), window.groups);
  return prepare_layer(args, window);
}

Tensor prepare_layer_cpu(Tensor codes, Tensor scale, Tensor zero_point, int64_t bits, int64_t channels,
                         std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                         OptTensor adapter_scale, OptTensor bias) {
  const char* op = "prepare_layer";
  CORA_CHECK(op, channels >= 1, "channels must be >= 1, got ", channels);
  const Window window = make_window(op, channels, kernel_size, stride, padding, dilation, groups);
  return prepare({op, codes, scale, zero_point, bits, a, b, adapter_scale, bias, kernel_size.empty()}, window, "codes");
}

Tensor run_layer_cpu(Tensor x, Tensor layer, std::vector<int64_t> geometry, std::optional<double> x_scale, int64_t x_zero_point,
                     int64_t x_bits, int64_t x_halo, OptTensor add, double add_scale, int64_t add_zero_point,
                     int64_t add_halo, double clamp_min, double clamp_max, std::optional<double> out_scale,
                     int64_t out_zero_point, int64_t out_halo) {
  const char* op = "run_layer";
  RunArgs args{op,        x_bits,         x_scale,  x_zero_point, x_halo,    add,       add_scale,
               add_zero_point, add_halo, clamp_min,    clamp_max, out_scale, out_zero_point, out_halo};
  const Layer view = view_layer(op, layer);
  const std::vector<int64_t> wanted = geometry_of(*view.h);  // what follows it is for other devices
  CORA_CHECK(op, geometry.size() >= wanted.size() && std::equal(wanted.begin(), wanted.end(), geometry.begin()),
             "geometry must be layer_geometry() of the layer");
  return run_layer(x, view, args);
}

/// Runs a layer that was prepared for this call only; quantizer tensors of one element as the modules store them.
Tensor run_once(const char* op, const Tensor& x, const Tensor& layer, const OptTensor& x_scale,
                const OptTensor& x_zero_point, int64_t x_bits) {
  RunArgs args{};
  args.op = op;
  args.x_bits = x_bits;
  args.low = -kInfinity;
  args.high = kInfinity;
  CORA_CHECK(op, x_scale.has_value() == x_zero_point.has_value(), "x_scale and x_zero_point must be given together");
  CORA_CHECK(op, is_float(x.scalar_type()), "x must have dtype float32, float16 or bfloat16, got ",
             dtype_text(x.scalar_type()));
  if (x_scale.has_value()) {
    check_dtype(op, "x_scale", *x_scale, ScalarType::Float);
    check_dtype(op, "x_zero_point", *x_zero_point, ScalarType::Int);
    CORA_CHECK(op, x_scale->numel() == 1, "x_scale must have 1 element, got shape ", shape_text(*x_scale));
    CORA_CHECK(op, x_zero_point->numel() == 1, "x_zero_point must have 1 element, got shape ",
               shape_text(*x_zero_point));
    args.x_scale = *data<float>(*x_scale);
    args.x_zero_point = *data<int32_t>(*x_zero_point);
  }
  return run_layer(x, view_layer(op, layer), args);
}

Tensor linear_lowrank_cpu(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits, OptTensor a,
                          OptTensor b, OptTensor adapter_scale, OptTensor bias, OptTensor x_scale,
                          OptTensor x_zero_point, int64_t x_bits) {
  const char* op = "linear_lowrank";
  CORA_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got shape []");
  const Window window = make_window(op, x.size(x.dim() - 1), {}, {}, {}, {}, 1);
  const Tensor layer = prepare({op, weight, scale, zero_point, bits, a, b, adapter_scale, bias, true}, window, "weight");
  return run_once(op, x, layer, x_scale, x_zero_point, x_bits);
}

Tensor conv2d_lowrank_cpu(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits,
                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                          OptTensor adapter_scale, OptTensor bias, OptTensor x_scale, OptTensor x_zero_point,
                          int64_t x_bits) {
  const char* op = "conv2d_lowrank";
  CORA_CHECK(op, x.dim() == 4, "x must have 4 dimensions, got shape ", shape_text(x));
  CORA_CHECK(op, kernel_size.size() == 2, "kernel_size must have 2 elements, got ", kernel_size.size());
  const Window window = make_window(op, x.size(1), kernel_size, stride, padding, dilation, groups);
  const Tensor layer = prepare({op, weight, scale, zero_point, bits, a, b, adapter_scale, bias, false}, window, "weight");
  return run_once(op, x, layer, x_scale, x_zero_point, x_bits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) {
  m.impl("prepare_layer", TORCH_BOX(&prepare_layer_cpu));
  m.impl("run_layer", TORCH_BOX(&run_layer_cpu));
  m.impl("linear_lowrank", TORCH_BOX(&linear_lowrank_cpu));
  m.impl("conv2d_lowrank", TORCH_BOX(&conv2d_lowrank_cpu));
}

}  // namespace cora
