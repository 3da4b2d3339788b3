// The ops: prepare_layer and run_layer, and linear_lowrank and conv2d_lowrank, which are one after the other.
#include "ops/layer.h"

#include <algorithm>

namespace cora {

namespace {

/// What a fake kernel has to know of a layer: [n] (linear), or [n, kernel, stride, padding, dilation].
std::vector<int64_t> geometry_of(const LayerHeader& h) {
  if (h.linear) return {h.n};
  return {h.n,          h.kernel[0],  h.kernel[1],   h.stride[0],  h.stride[1],
          h.padding[0], h.padding[1], h.dilation[0], h.dilation[1]};
}

Tensor prepare(const LayerArgs& args, const Window& window, const char* name) {
  check_operands(name, args, window);
  return prepare_layer(args, window);
}

Tensor prepare_layer_cpu(Tensor codes, Tensor scale, Tensor zero_point, int64_t bits, int64_t channels,
                         std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                         OptTensor adapter_scale, OptTensor bias) {
  const char* op = "prepare_layer";
  const Window window = make_window(op, kernel_size.empty(), channels, kernel_size, stride, padding, dilation, groups);
  return prepare({op, codes, scale, zero_point, bits, a, b, adapter_scale, bias}, window, "codes");
}

Tensor run_layer_cpu(Tensor x, Tensor layer, std::vector<int64_t> geometry, std::optional<double> x_scale,
                     int64_t x_zero_point, int64_t x_bits, int64_t x_halo, OptTensor add, double add_scale,
                     int64_t add_zero_point, int64_t add_halo, double clamp_min, double clamp_max,
                     std::optional<double> out_scale, int64_t out_zero_point, int64_t out_halo) {
  const char* op = "run_layer";
  RunArgs args{op,       x_bits,    x_scale,   x_zero_point, x_halo,         add,     add_scale, add_zero_point,
               add_halo, clamp_min, clamp_max, out_scale,    out_zero_point, out_halo};
  const Layer view = view_layer(op, layer);
  const std::vector<int64_t> wanted = geometry_of(*view.h);  // what follows it is for other devices
  CORA_CHECK(op, geometry.size() >= wanted.size() && std::equal(wanted.begin(), wanted.end(), geometry.begin()),
             "geometry must be layer_geometry() of the layer");
  return run_layer(x, view, args);
}

/// Runs a layer that was prepared for this call only; quantizer tensors of one element as the modules store them.
Tensor run_once(const char* op, const Tensor& x, const Tensor& layer, const OptTensor& x_scale,
                const OptTensor& x_zero_point, int64_t x_bits) {
  check_input(op, x, x_scale, x_zero_point, x_bits);
  RunArgs args{};
  args.op = op;
  args.x_bits = x_bits;
  if (x_scale.has_value()) {
    args.x_scale = *data<float>(*x_scale);
    args.x_zero_point = *data<int32_t>(*x_zero_point);
  }
  return run_layer(x, view_layer(op, layer), args);
}

Tensor linear_lowrank_cpu(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits, OptTensor a,
                          OptTensor b, OptTensor adapter_scale, OptTensor bias, OptTensor x_scale,
                          OptTensor x_zero_point, int64_t x_bits) {
  const char* op = "linear_lowrank";
  const Window window = make_window(op, true, channels_of(op, x, true), {}, {}, {}, {}, 1);
  const Tensor layer = prepare({op, weight, scale, zero_point, bits, a, b, adapter_scale, bias}, window, "weight");
  return run_once(op, x, layer, x_scale, x_zero_point, x_bits);
}

Tensor conv2d_lowrank_cpu(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits,
                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                          OptTensor adapter_scale, OptTensor bias, OptTensor x_scale, OptTensor x_zero_point,
                          int64_t x_bits) {
  const char* op = "conv2d_lowrank";
  const Window window =
      make_window(op, false, channels_of(op, x, false), kernel_size, stride, padding, dilation, groups);
  const Tensor layer = prepare({op, weight, scale, zero_point, bits, a, b, adapter_scale, bias}, window, "weight");
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
