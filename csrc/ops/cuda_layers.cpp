// prepare_layer, run_layer, linear_lowrank and conv2d_lowrank on CUDA tensors: checks, allocation, and the path where
// no fused kernel takes the layer or the input (cuda/layout.h, is_tiled; float32 x; a rank above kMaxRank): the weight
// with its adapter is written out for the call, and torch's own operator runs on it.
#include "bits.h"
#include "ops/cuda_door.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace cora {

namespace {

namespace stable = torch::stable;

template <size_t kStack, typename... Args>
Tensor call_aten(const char* name, const Args&... args) {
  std::array<StableIValue, kStack> stack{stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

// --- The layer ---------------------------------------------------------------------------------------------------

cuda::LayerShape make_shape(const char* op, const Window& w, int64_t n, int64_t bits, int64_t q_rows, int64_t q_groups,
                            int64_t rank, int64_t adapter) {
  CORA_CHECK(op, n <= INT32_MAX / 2 && w.channels <= INT32_MAX / 2 && w.k() <= INT32_MAX / 2,
             "the layer must have fewer than 2^30 rows and columns, got ", n, " and ", w.k());
  cuda::LayerShape s{};
  s.n = static_cast<int32_t>(n);
  s.channels = static_cast<int32_t>(w.channels);
  s.groups = static_cast<int32_t>(w.groups);
  for (int d = 0; d < 2; ++d) {
    CORA_CHECK(op, std::max({w.kernel[d], w.stride[d], w.padding[d], w.dilation[d]}) < 32768,
               "kernel_size, stride, padding and dilation must be < 32768, got ", w.kernel[d], ", ", w.stride[d], ", ",
               w.padding[d], " and ", w.dilation[d], " along dimension ", 2 + d);
    s.kernel[d] = static_cast<int32_t>(w.kernel[d]);
    s.stride[d] = static_cast<int32_t>(w.stride[d]);
    s.padding[d] = static_cast<int32_t>(w.padding[d]);
    s.dilation[d] = static_cast<int32_t>(w.dilation[d]);
  }
  s.bits = static_cast<int32_t>(bits);
  s.q_rows = static_cast<int32_t>(q_rows);
  s.q_groups = static_cast<int32_t>(q_groups);
  s.rank = static_cast<int32_t>(rank);
  s.adapter = static_cast<int32_t>(adapter);
  return s;
}

cuda::LayerShape shape_of(const LayerArgs& v, const Window& w) {
  return make_shape(v.op, w, v.weight.size(0), v.bits, v.scale.size(0), v.scale.size(1), v.b ? v.b->size(1) : 0,
                    v.a ? element_type(v.a->scalar_type()) : cuda::kInt8);
}

Tensor prepare(const LayerArgs& v, const cuda::LayerShape& shape) {
  const CudaCall call(v.op, v.weight);
  const auto dense = [](const OptTensor& t) { return t.has_value() ? OptTensor(as_contiguous(*t)) : OptTensor(); };
  const Tensor codes = as_contiguous(v.weight), scale = as_contiguous(v.scale), zero = as_contiguous(v.zero_point);
  const OptTensor a = dense(v.a), b = dense(v.b), adapter_scale = dense(v.adapter_scale), bias = dense(v.bias);
  Tensor prepared = allocate(codes, {cuda::parts_of(shape).bytes}, ScalarType::Byte);
  cuda::LayerParameters in{};
  in.codes = data<uint8_t>(codes);
  in.scale = data<float>(scale);
  in.zero_point = data<int32_t>(zero);
  in.a = a ? a->const_data_ptr() : nullptr;
  in.b = b ? b->const_data_ptr() : nullptr;
  in.adapter_scale = adapter_scale ? data<float>(*adapter_scale) : nullptr;
  in.bias = bias ? data<float>(*bias) : nullptr;
  call.check(call.api.prepare(shape, in, mutable_data<uint8_t>(prepared), call.stream));
  return prepared;
}

// --- A call of it ------------------------------------------------------------------------------------------------

/// Strides of x as images of one pixel (linear) or as they are.
cuda::PixelStrides strides_of(const Tensor& t, bool linear) {
  if (!linear) return pixel_strides(t);
  const int64_t k = t.size(t.dim() - 1);
  return {k, k, k, 1};
}

/// The quantizer of x, as far as the host knows it; its data is not filled in.
cuda::Input quantizer_of(const RunArgs& args, bool codes) {
  cuda::Input in{};
  in.x_bits = static_cast<int32_t>(codes ? 8 : args.x_bits);
  in.halo = static_cast<int32_t>(args.x_halo);
  if (args.x_bits == 0) return in;
  in.parameters = args.x_scale ? cuda::kOnHost : cuda::kDynamic;
  in.host_scale = static_cast<float>(args.x_scale.value_or(1));
  in.host_zero_point = static_cast<int32_t>(args.x_zero_point);
  return in;
}

/// `w` is check_run's, `in` quantizer_of(args, ..). has_bias: false where the layer is known to have none.
Tensor run(const RunArgs& args, const cuda::LayerShape& shape, bool has_bias, const Window& w, cuda::Input in,
           const Tensor& x_in, const Tensor& prepared) {
  const char* op = args.op;
  const bool codes = x_in.scalar_type() == ScalarType::Byte, linear = w.linear;
  check_same_device(op, "layer", prepared, x_in);
  check_dtype(op, "layer", prepared, ScalarType::Byte);
  check_shape(op, "layer", prepared, {cuda::parts_of(shape).bytes});
  const CudaCall call(op, x_in);
  const Tensor x = linear ? as_contiguous(x_in) : x_in;
  in.data = x.numel() > 0 ? x.const_data_ptr() : nullptr;
  in.type = element_type(x.scalar_type());
  in.strides = strides_of(x, linear);
  CORA_CHECK(op, w.batch <= INT32_MAX / 2, "x must have fewer than 2^30 rows, got ", w.batch);
  in.items = static_cast<int32_t>(w.batch);
  in.height = static_cast<int32_t>(w.size[0]);
  in.width = static_cast<int32_t>(w.size[1]);
  cuda::Plan plan{};
  call.check(call.api.plan(shape, in, &plan));
  const bool merge = plan.method == cuda::kMerge;

  // The result: channels-last if x is, or if one of them is codes.
  const ScalarType type = args.out_scale ? ScalarType::Byte : codes ? ScalarType::Float : x.scalar_type();
  const bool channels_last = !linear && (codes || args.out_scale || prefers_channels_last(x));
  const std::vector<int64_t> out_shape = output_shape(x, w, shape.n, args.out_halo);
  cuda::Epilogue e{};
  Tensor out;
  const auto write_to = [&](const Tensor& t) {
    out = t;
    e.out_strides = strides_of(out, linear);
    e.out = static_cast<char*>(out.mutable_data_ptr()) +
            args.out_halo * (e.out_strides.row + e.out_strides.pixel) * cuda::element_bytes(element_type(type));
  };
  const bool empty = std::find(out_shape.begin(), out_shape.end(), 0) != out_shape.end();
  if (!merge || args.out_scale || empty) write_to(allocate(x, out_shape, type, channels_last));
  if (empty) return out;
  e.out_type = element_type(type);
  e.low = static_cast<float>(args.low);
  e.high = static_cast<float>(args.high);
  if (args.out_scale) {
    e.out_scale = static_cast<float>(*args.out_scale);
    e.out_inverse = 1.0f / e.out_scale;
    e.out_zero = static_cast<int32_t>(args.out_zero_point);
    e.out_top = 255;
    if (!linear && args.out_halo > 0)
      e.border = {mutable_data<uint8_t>(out),
                  in.items,
                  static_cast<int>(out_shape[2]),
                  static_cast<int>(out_shape[3]),
                  shape.n,
                  static_cast<int>(args.out_halo),
                  e.out_zero};
  }
  Tensor add;
  if (args.add.has_value()) {
    add = linear ? as_contiguous(*args.add) : *args.add;
    e.add_type = element_type(add.scalar_type());
    e.add_strides = strides_of(add, linear);
    e.add = static_cast<const char*>(add.const_data_ptr()) +
            args.add_halo * (e.add_strides.row + e.add_strides.pixel) * cuda::element_bytes(e.add_type);
    e.add_scale = static_cast<float>(args.add_scale);
    e.add_zero = static_cast<int32_t>(args.add_zero_point);
  }

  if (!merge) {
    Tensor workspace = allocate(x, {plan.bytes}, ScalarType::Byte);
    call.check(
        call.api.run(shape, data<uint8_t>(prepared), in, plan, e, mutable_data<uint8_t>(workspace), call.stream));
    return out;
  }

  // torch's own operator on the merged weight.
  Tensor values = x;
  const int channels = shape.channels;
  if (in.x_bits > 0) {
    std::vector<int64_t> value_shape = sizes_of(x);
    if (!linear) value_shape[2] = in.height, value_shape[3] = in.width;
    values = allocate(x, value_shape, ScalarType::Float);
    Tensor workspace = allocate(x, {call.api.values_bytes(in, channels)}, ScalarType::Byte);
    call.check(
        call.api.values(in, channels, mutable_data<float>(values), mutable_data<uint8_t>(workspace), call.stream));
  }
  const ScalarType compute = values.scalar_type();
  const std::vector<int64_t> matrix{shape.n, cuda::columns_of(shape)};
  const std::vector<int64_t> filter{shape.n, shape.channels / shape.groups, shape.kernel[0], shape.kernel[1]};
  const int compute_type = element_type(compute);
  Tensor weight =
      linear ? allocate(x, matrix, compute) : allocate(x, filter, compute, cuda::merges_by_tiles(shape, compute_type));
  // A product adds the bias on the way; a convolution of cuDNN would take another pass over y for it, which is ours.
  OptTensor bias;
  if (linear && has_bias) bias = allocate(x, {shape.n}, compute);
  call.check(call.api.merge(shape, data<uint8_t>(prepared), weight.mutable_data_ptr(),
                            bias ? bias->mutable_data_ptr() : nullptr, compute_type, call.stream));
  const auto pair = [](const int32_t (&v)[2]) { return std::vector<int64_t>{v[0], v[1]}; };
  Tensor y = linear ? call_aten<3>("aten::linear", values, weight, bias)
                    : call_aten<9>("aten::convolution", values, weight, bias, pair(shape.stride), pair(shape.padding),
                                   pair(shape.dilation), false, std::vector<int64_t>{0, 0}, int64_t{shape.groups});
  if (linear) y = as_contiguous(y);
  // y is the result where it lies as that should, finished in place where anything is left to do. Its type may not be
  // `compute`: under torch.autocast the operator returns another.
  const bool add_bias = !linear && has_bias;
  if (out.defined() || y.scalar_type() != type || !(channels_last ? is_channels_last(y) : y.is_contiguous())) {
    if (!out.defined()) write_to(allocate(x, out_shape, type, channels_last));
  } else {
    write_to(y);
    if (!add_bias && e.add == nullptr && std::isinf(args.low) && std::isinf(args.high)) return y;
  }
  const auto* biases = reinterpret_cast<const float*>(data<uint8_t>(prepared) + cuda::parts_of(shape).bias);
  call.check(call.api.finish(y.const_data_ptr(), element_type(y.scalar_type()), strides_of(y, linear), in.items,
                             linear ? 1 : plan.out_height, linear ? 1 : plan.out_width, shape.n,
                             add_bias ? biases : nullptr, e, call.stream));
  return out;
}

// --- The ops -----------------------------------------------------------------------------------------------------

Tensor prepare_layer_cuda(Tensor codes, Tensor scale, Tensor zero_point, int64_t bits, int64_t channels,
                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                          OptTensor adapter_scale, OptTensor bias) {
  const char* op = "prepare_layer";
  const Window window = make_window(op, kernel_size.empty(), channels, kernel_size, stride, padding, dilation, groups);
  const LayerArgs args{op, codes, scale, zero_point, bits, a, b, adapter_scale, bias};
  check_operands("codes", args, window);
  return prepare(args, shape_of(args, window));
}

/// geometry: [n], or [n, kernel, stride, padding, dilation] with two numbers each; then what only the CPU's prepared
/// layer tells by itself (a GPU's cannot be read without waiting for it): channels, groups, bits, the two sizes of
/// scale, rank, element type of the adapter, whether there may be a bias.
Tensor run_layer_cuda(Tensor x, Tensor layer, std::vector<int64_t> geometry, std::optional<double> x_scale,
                      int64_t x_zero_point, int64_t x_bits, int64_t x_halo, OptTensor add, double add_scale,
                      int64_t add_zero_point, int64_t add_halo, double clamp_min, double clamp_max,
                      std::optional<double> out_scale, int64_t out_zero_point, int64_t out_halo) {
  const char* op = "run_layer";
  CORA_CHECK(op, geometry.size() == 9 || geometry.size() == 17, "geometry must have 9 or 17 elements on CUDA, got ",
             geometry.size());
  const bool linear = geometry.size() == 9;
  const auto pair = [&](size_t at) {
    return linear ? std::vector<int64_t>{} : std::vector<int64_t>{geometry[at], geometry[at + 1]};
  };
  const int64_t* rest = geometry.data() + (linear ? 1 : 9);
  const Window layer_window = make_window(op, linear, rest[0], pair(1), pair(3), pair(5), pair(7), rest[1]);
  const RunArgs args{op,       x_bits,    x_scale,   x_zero_point, x_halo,         add,     add_scale, add_zero_point,
                     add_halo, clamp_min, clamp_max, out_scale,    out_zero_point, out_halo};
  const Window window = check_run(x, layer_window, geometry[0], args);
  const cuda::LayerShape shape = make_shape(op, window, geometry[0], rest[2], rest[3], rest[4], rest[5], rest[6]);
  return run(args, shape, rest[7] != 0, window, quantizer_of(args, x.scalar_type() == ScalarType::Byte), x, layer);
}

/// Prepared for this call only; the quantizer's tensors stay on the device.
Tensor run_once(const LayerArgs& layer, const Window& layer_window, const Tensor& x, const OptTensor& x_scale,
                const OptTensor& x_zero_point, int64_t x_bits) {
  const char* op = layer.op;
  check_operands("weight", layer, layer_window);
  check_input(op, x, x_scale, x_zero_point, x_bits);
  check_same_device(op, "weight", layer.weight, x);
  RunArgs args{};
  args.op = op;
  args.x_bits = x_bits;
  const Window window = check_run(x, layer_window, layer.weight.size(0), args);
  cuda::Input in = quantizer_of(args, false);
  if (x_scale.has_value()) {
    in.parameters = cuda::kOnDevice;
    in.scale = data<float>(*x_scale);
    in.zero_point = data<int32_t>(*x_zero_point);
  }
  const cuda::LayerShape shape = shape_of(layer, window);
  return run(args, shape, layer.bias.has_value(), window, in, x, prepare(layer, shape));
}

Tensor linear_lowrank_cuda(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits, OptTensor a,
                           OptTensor b, OptTensor adapter_scale, OptTensor bias, OptTensor x_scale,
                           OptTensor x_zero_point, int64_t x_bits) {
  const char* op = "linear_lowrank";
  const Window window = make_window(op, true, channels_of(op, x, true), {}, {}, {}, {}, 1);
  return run_once({op, weight, scale, zero_point, bits, a, b, adapter_scale, bias}, window, x, x_scale, x_zero_point,
                  x_bits);
}

Tensor conv2d_lowrank_cuda(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits,
                           std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                           std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                           OptTensor adapter_scale, OptTensor bias, OptTensor x_scale, OptTensor x_zero_point,
                           int64_t x_bits) {
  const char* op = "conv2d_lowrank";
  const Window window =
      make_window(op, false, channels_of(op, x, false), kernel_size, stride, padding, dilation, groups);
  return run_once({op, weight, scale, zero_point, bits, a, b, adapter_scale, bias}, window, x, x_scale, x_zero_point,
                  x_bits);
}

}  // namespace

CORA_CUDA_LIBRARY(m) {
  m.impl("prepare_layer", TORCH_BOX(&prepare_layer_cuda));
  m.impl("run_layer", TORCH_BOX(&run_layer_cuda));
  m.impl("linear_lowrank", TORCH_BOX(&linear_lowrank_cuda));
  m.impl("conv2d_lowrank", TORCH_BOX(&conv2d_lowrank_cuda));
}

}  // namespace cora
