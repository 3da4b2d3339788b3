// prepare_layer, run_layer, linear_lowrank and conv2d_lowrank on CUDA tensors: checks, allocation, and the path where
// no fused kernel takes the layer or the input (cuda/layout.h, is_tiled; float32 x; a rank above kMaxRank): the weight
// with its adapter is written out for the call, and torch's own operator runs on it.
#include "bits.h"
#include "ops/cuda_door.h"

#include <array>
#include <cmath>
#include <limits>

namespace cora {

namespace {

namespace stable = torch::stable;

template <size_t kStack, typename... Args>
Tensor call_aten(const char* name, const Args&... args) {
  std::array<StableIValue, kStack> stack{stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

/// `count` float32 numbers at a byte of the prepared layer.
Tensor floats_in(const Tensor& prepared, int64_t at, int64_t count) {
  Tensor bytes = prepared;
  const Tensor part = stable::narrow(bytes, 0, at, count * 4);
  std::array<StableIValue, 2> stack{stable::detail::from(part), stable::detail::from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::view", "dtype", stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

// --- The layer ---------------------------------------------------------------------------------------------------

struct Operands {
  Tensor codes, scale, zero_point;
  OptTensor a, b, adapter_scale, bias;
};

struct Geometry {
  bool linear;
  int64_t channels, groups;
  std::vector<int64_t> kernel, stride, padding, dilation;
};

void check_pair(const char* op, const char* name, const std::vector<int64_t>& v, int64_t least) {
  CORA_CHECK(op, v.size() == 2, name, " must have 2 elements, got ", v.size());
  CORA_CHECK(op, v[0] >= least && v[1] >= least, name, " must be >= ", least, ", got [", v[0], ", ", v[1], "]");
  CORA_CHECK(op, v[0] < 32768 && v[1] < 32768, name, " must be < 32768, got [", v[0], ", ", v[1], "]");
}

/// A linear layer comes with an empty kernel.
Geometry make_geometry(const char* op, int64_t channels, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  Geometry g{kernel.empty(), channels, groups, std::move(kernel), std::move(stride), std::move(padding),
             std::move(dilation)};
  CORA_CHECK(op, channels >= 1, "channels must be >= 1, got ", channels);
  CORA_CHECK(op, groups >= 1 && channels % groups == 0, "groups must divide the ", channels, " channels, got ", groups);
  if (g.linear) {
    g.kernel = g.stride = g.dilation = {1, 1};
    g.padding = {0, 0};
    return g;
  }
  check_pair(op, "kernel_size", g.kernel, 1);
  check_pair(op, "stride", g.stride, 1);
  check_pair(op, "padding", g.padding, 0);
  check_pair(op, "dilation", g.dilation, 1);
  return g;
}

cuda::LayerShape make_shape(const char* op, const Geometry& g, int64_t n, int64_t bits, int64_t q_rows, int64_t q_groups,
                            int64_t rank, int64_t adapter) {
  const int64_t k = g.channels / g.groups * g.kernel[0] * g.kernel[1];
  CORA_CHECK(op, n <= INT32_MAX / 2 && g.channels <= INT32_MAX / 2 && k <= INT32_MAX / 2,
             "the layer must have fewer than 2^30 rows and columns, got ", n, " and ", k);
  cuda::LayerShape s{};
  s.n = static_cast<int32_t>(n);
  s.channels = static_cast<int32_t>(g.channels);
  s.groups = static_cast<int32_t>(g.groups);
  for (int d = 0; d < 2; ++d) {
    s.kernel[d] = static_cast<int32_t>(g.kernel[d]);
    s.stride[d] = static_cast<int32_t>(g.stride[d]);
    s.padding[d] = static_cast<int32_t>(g.padding[d]);
    s.dilation[d] = static_cast<int32_t>(g.dilation[d]);
  }
  s.bits = static_cast<int32_t>(bits);
  s.q_rows = static_cast<int32_t>(q_rows);
  s.q_groups = static_cast<int32_t>(q_groups);
  s.rank = static_cast<int32_t>(rank);
  s.adapter = static_cast<int32_t>(adapter);
  return s;
}

cuda::LayerShape check_operands(const char* op, const char* name, const Operands& o, int64_t bits, const Geometry& g) {
  const int64_t k = g.channels / g.groups * g.kernel[0] * g.kernel[1], n = o.codes.size(0);
  const QParamShape q = check_packed(op, name, o.codes, o.scale, o.zero_point, bits, k);
  CORA_CHECK(op, n % g.groups == 0, "groups must divide the ", n, " rows of ", name, ", got ", g.groups);
  CORA_CHECK(op, o.a.has_value() == o.b.has_value(), "a and b must be given together");
  int64_t rank = 0, adapter = cuda::kInt8;
  if (o.a.has_value()) {
    const ScalarType type = o.a->scalar_type();
    CORA_CHECK(op, type == ScalarType::Char || is_float_dtype(type),
               "a must have dtype int8, float16, bfloat16 or float32, got ", dtype_text(type));
    check_dtype(op, "b", *o.b, type);
    CORA_CHECK(op, o.b->dim() == 2, "b must have 2 dimensions, got shape ", shape_text(*o.b));
    rank = o.b->size(1);
    check_shape(op, "b", *o.b, {n, rank});
    check_shape(op, "a", *o.a, {g.groups * rank, k});
    check_same_device(op, "a", *o.a, o.codes);
    check_same_device(op, "b", *o.b, o.codes);
    if (type == ScalarType::Char) {
      CORA_CHECK(op, o.adapter_scale.has_value(), "adapter_scale must be given with an int8 adapter");
      check_dtype(op, "adapter_scale", *o.adapter_scale, ScalarType::Float);
      check_shape(op, "adapter_scale", *o.adapter_scale, {g.groups * rank});
      check_same_device(op, "adapter_scale", *o.adapter_scale, o.codes);
    } else {
      CORA_CHECK(op, !o.adapter_scale.has_value(), "adapter_scale must be None with a float adapter");
    }
    adapter = element_type(type);
  } else {
    CORA_CHECK(op, !o.adapter_scale.has_value(), "adapter_scale must be None without an adapter");
  }
  if (o.bias.has_value()) {
    check_dtype(op, "bias", *o.bias, ScalarType::Float);
    check_shape(op, "bias", *o.bias, {n});
    check_same_device(op, "bias", *o.bias, o.codes);
  }
  return make_shape(op, g, n, bits, q.rows, q.groups, rank, adapter);
}

Tensor prepare(const char* op, const Operands& o, const cuda::LayerShape& shape) {
  const CudaCall call(op, o.codes);
  const auto dense = [](const OptTensor& t) { return t.has_value() ? OptTensor(as_contiguous(*t)) : OptTensor(); };
  const Tensor codes = as_contiguous(o.codes), scale = as_contiguous(o.scale), zero = as_contiguous(o.zero_point);
  const OptTensor a = dense(o.a), b = dense(o.b), adapter_scale = dense(o.adapter_scale), bias = dense(o.bias);
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

struct RunArgs {
  const char* op;
  cuda::Input quantizer{};  // x_bits, halo, parameters; its data is filled in here
  OptTensor add;
  float add_scale = 1;
  int64_t add_zero = 0, add_halo = 0;
  float low = -INFINITY, high = INFINITY;
  std::optional<double> out_scale;
  int64_t out_zero = 0, out_halo = 0;
};

/// Strides of x as images of one pixel (linear) or as they are.
cuda::PixelStrides strides_of(const Tensor& t, bool linear) {
  if (!linear) return pixel_strides(t);
  const int64_t k = t.size(t.dim() - 1);
  return {k, k, k, 1};
}

Tensor run(const RunArgs& args, const cuda::LayerShape& shape, bool linear, const Tensor& x_in, const Tensor& prepared) {
  const char* op = args.op;
  const bool codes = x_in.scalar_type() == ScalarType::Byte;
  CORA_CHECK(op, codes || is_float_dtype(x_in.scalar_type()),
             "x must have dtype float32, float16, bfloat16 or uint8, got ", dtype_text(x_in.scalar_type()));
  check_same_device(op, "layer", prepared, x_in);
  check_dtype(op, "layer", prepared, ScalarType::Byte);
  check_shape(op, "layer", prepared, {cuda::parts_of(shape).bytes});
  const CudaCall call(op, x_in);
  const Tensor x = linear ? as_contiguous(x_in) : x_in;
  const int64_t halo = codes ? args.quantizer.halo : 0;
  const int64_t last = linear ? x.dim() - 1 : 1;
  CORA_CHECK(op, x.size(last) == shape.channels, "x must have ", shape.channels, " channels along dimension ", last,
             ", got shape ", shape_text(x));
  cuda::Input in = args.quantizer;
  in.data = x.numel() > 0 ? x.const_data_ptr() : nullptr;
  in.type = element_type(x.scalar_type());
  in.strides = strides_of(x, linear);
  const int64_t items = linear ? x.numel() / shape.channels : x.size(0);
  CORA_CHECK(op, items <= INT32_MAX / 2, "x must have fewer than 2^30 rows, got ", items);
  in.items = static_cast<int32_t>(items);
  in.height = static_cast<int32_t>(linear ? 1 : x.size(2) - 2 * halo);
  in.width = static_cast<int32_t>(linear ? 1 : x.size(3) - 2 * halo);
  const bool integer = codes || in.x_bits > 0;
  CORA_CHECK(op, !codes || in.parameters != cuda::kDynamic, "x_scale must be given with codes");
  CORA_CHECK(op, !integer || cuda::columns_of(shape) <= 65536, "k must be <= 65536 with quantised input, got ",
             cuda::columns_of(shape));
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = int64_t{shape.dilation[d]} * (shape.kernel[d] - 1) + 1;
    const int64_t padded = (d == 0 ? in.height : in.width) + 2 * int64_t{shape.padding[d]};
    CORA_CHECK(op, padded >= reach, "x's padded height and width must be at least ", reach, " along dimension ", 2 + d,
               ", got ", padded);
  }
  cuda::Plan plan{};
  call.check(call.api.plan(shape, in, &plan));

  // The result: channels-last if x is, or if one of them is codes.
  const ScalarType type = args.out_scale ? ScalarType::Byte : codes ? ScalarType::Float : x.scalar_type();
  const bool channels_last = !linear && (codes || args.out_scale || (!x.is_contiguous() && is_channels_last(x)));
  std::vector<int64_t> out_shape = sizes_of(x);
  out_shape[static_cast<size_t>(last)] = shape.n;
  if (!linear) {
    out_shape[2] = plan.out_height + 2 * args.out_halo;
    out_shape[3] = plan.out_width + 2 * args.out_halo;
  }
  Tensor out = allocate(x, out_shape, type, channels_last);
  if (out.numel() == 0) return out;
  cuda::Epilogue e{};
  e.out_strides = strides_of(out, linear);
  e.out = static_cast<char*>(out.mutable_data_ptr()) +
          args.out_halo * (e.out_strides.row + e.out_strides.pixel) * cuda::element_bytes(element_type(type));
  e.out_type = element_type(type);
  e.low = args.low;
  e.high = args.high;
  if (args.out_scale) {
    e.out_scale = static_cast<float>(*args.out_scale);
    e.out_inverse = 1.0f / e.out_scale;
    e.out_zero = static_cast<int32_t>(args.out_zero);
    e.out_top = 255;
    if (!linear)
      call.check(call.api.fill_border(mutable_data<uint8_t>(out), in.items, static_cast<int>(out_shape[2]),
                                      static_cast<int>(out_shape[3]), shape.n, static_cast<int>(args.out_halo),
                                      e.out_zero, call.stream));
  }
  Tensor add;
  if (args.add.has_value()) {
    const ScalarType add_type = args.add->scalar_type();
    CORA_CHECK(op, add_type == ScalarType::Byte || is_float_dtype(add_type),
               "add must have dtype float32, float16, bfloat16 or uint8, got ", dtype_text(add_type));
    check_same_device(op, "add", *args.add, x);
    std::vector<int64_t> wanted = out_shape;
    if (!linear)
      for (size_t d : {2u, 3u}) wanted[d] += 2 * (args.add_halo - args.out_halo);
    check_shape(op, "add", *args.add, wanted);
    add = linear ? as_contiguous(*args.add) : *args.add;
    e.add_type = element_type(add_type);
    e.add_strides = strides_of(add, linear);
    e.add = static_cast<const char*>(add.const_data_ptr()) +
            args.add_halo * (e.add_strides.row + e.add_strides.pixel) * cuda::element_bytes(e.add_type);
    e.add_scale = args.add_scale;
    e.add_zero = static_cast<int32_t>(args.add_zero);
  }

  if (plan.method != cuda::kMerge) {
    Tensor workspace = allocate(x, {plan.bytes}, ScalarType::Byte);
    call.check(call.api.run(shape, data<uint8_t>(prepared), in, plan, e, mutable_data<uint8_t>(workspace), call.stream));
    return out;
  }

  // torch's own operator on the merged weight.
  Tensor values = x;
  const int channels = shape.channels;
  if (integer) {
    std::vector<int64_t> value_shape = sizes_of(x);
    if (!linear) value_shape[2] = in.height, value_shape[3] = in.width;
    values = allocate(x, value_shape, ScalarType::Float);
    Tensor workspace = allocate(x, {call.api.values_bytes(in, channels)}, ScalarType::Byte);
    call.check(call.api.values(in, channels, mutable_data<float>(values), mutable_data<uint8_t>(workspace), call.stream));
  }
  const ScalarType compute = values.scalar_type();
  const std::vector<int64_t> matrix{shape.n, cuda::columns_of(shape)};
  const std::vector<int64_t> filter{shape.n, shape.channels / shape.groups, shape.kernel[0], shape.kernel[1]};
  Tensor weight = allocate(x, linear ? matrix : filter, compute);
  call.check(call.api.merge(shape, data<uint8_t>(prepared), weight.mutable_data_ptr(), element_type(compute), call.stream));
  const cuda::Parts parts = cuda::parts_of(shape);
  // The bias lies in the prepared layer as float32.
  Tensor bias = to_dtype(floats_in(prepared, parts.bias, shape.n), compute);
  const auto pair = [](const int32_t (&v)[2]) { return std::vector<int64_t>{v[0], v[1]}; };
  const Tensor y = linear ? call_aten<3>("aten::linear", values, weight, OptTensor(bias))
                          : call_aten<9>("aten::convolution", values, weight, OptTensor(bias), pair(shape.stride),
                                         pair(shape.padding), pair(shape.dilation), false, std::vector<int64_t>{0, 0},
                                         int64_t{shape.groups});
  const Tensor y_dense = linear ? as_contiguous(y) : y;
  call.check(call.api.finish(y_dense.const_data_ptr(), element_type(compute), strides_of(y_dense, linear), in.items,
                             linear ? 1 : plan.out_height, linear ? 1 : plan.out_width, shape.n, e, call.stream));
  return out;
}

// --- The ops -----------------------------------------------------------------------------------------------------

Tensor prepare_layer_cuda(Tensor codes, Tensor scale, Tensor zero_point, int64_t bits, int64_t channels,
                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                          OptTensor adapter_scale, OptTensor bias) {
  const char* op = "prepare_layer";
  const Geometry g = make_geometry(op, channels, kernel_size, stride, padding, dilation, groups);
  const Operands o{codes, scale, zero_point, a, b, adapter_scale, bias};
  return prepare(op, o, check_operands(op, "codes", o, bits, g));
}

/// geometry: [n], or [n, kernel, stride, padding, dilation] with two numbers each; then what only the CPU's prepared
/// layer tells by itself (a GPU's cannot be read without waiting for it): groups, bits, the two sizes of scale, rank,
/// element type of the adapter.
Tensor run_layer_cuda(Tensor x, Tensor layer, std::vector<int64_t> geometry, std::optional<double> x_scale,
                      int64_t x_zero_point, int64_t x_bits, int64_t x_halo, OptTensor add, double add_scale,
                      int64_t add_zero_point, int64_t add_halo, double clamp_min, double clamp_max,
                      std::optional<double> out_scale, int64_t out_zero_point, int64_t out_halo) {
  const char* op = "run_layer";
  CORA_CHECK(op, geometry.size() == 7 || geometry.size() == 15, "geometry must have 7 or 15 elements on CUDA, got ",
             geometry.size());
  const bool linear = geometry.size() == 7;
  CORA_CHECK(op, linear ? x.dim() >= 1 : x.dim() == 4, "x must have ", linear ? "at least 1 dimension" : "4 dimensions",
             ", got shape ", shape_text(x));
  const auto pair = [&](size_t at) {
    return linear ? std::vector<int64_t>{} : std::vector<int64_t>{geometry[at], geometry[at + 1]};
  };
  const int64_t* rest = geometry.data() + (linear ? 1 : 9);
  const int64_t channels = linear ? x.size(x.dim() - 1) : x.size(1);
  const Geometry g = make_geometry(op, channels, pair(1), pair(3), pair(5), pair(7), rest[0]);
  const cuda::LayerShape shape = make_shape(op, g, geometry[0], rest[1], rest[2], rest[3], rest[4], rest[5]);
  CORA_CHECK(op, x_bits == 0 || (x_bits >= kMinBits && x_bits <= kMaxBits), "x_bits must be 0 or 2..8, got ", x_bits);
  const bool integer = x_bits > 0 || x.scalar_type() == ScalarType::Byte;
  RunArgs args{};
  args.op = op;
  args.quantizer.x_bits = static_cast<int32_t>(x.scalar_type() == ScalarType::Byte ? 8 : x_bits);
  args.quantizer.halo = static_cast<int32_t>(x_halo);
  if (integer) {
    args.quantizer.parameters = x_scale ? cuda::kOnHost : cuda::kDynamic;
    args.quantizer.host_scale = x_scale ? static_cast<float>(*x_scale) : 1.0f;
    args.quantizer.host_zero_point = static_cast<int32_t>(x_zero_point);
  }
  args.add = add;
  args.add_scale = static_cast<float>(add_scale);
  args.add_zero = add_zero_point;
  args.add_halo = add_halo;
  args.low = static_cast<float>(clamp_min);
  args.high = static_cast<float>(clamp_max);
  args.out_scale = out_scale;
  args.out_zero = out_zero_point;
  args.out_halo = out_halo;
  return run(args, shape, linear, x, layer);
}

/// Prepared for this call only; the quantizer's tensors stay on the device.
Tensor run_once(const char* op, const Geometry& g, const Tensor& x, const Operands& o, int64_t bits,
                const OptTensor& x_scale, const OptTensor& x_zero_point, int64_t x_bits) {
  const cuda::LayerShape shape = check_operands(op, "weight", o, bits, g);
  CORA_CHECK(op, is_float_dtype(x.scalar_type()), "x must have dtype float32, float16 or bfloat16, got ",
             dtype_text(x.scalar_type()));
  check_same_device(op, "weight", o.codes, x);
  CORA_CHECK(op, x_bits == 0 || (x_bits >= kMinBits && x_bits <= kMaxBits), "x_bits must be 0 or 2..8, got ", x_bits);
  CORA_CHECK(op, x_scale.has_value() == x_zero_point.has_value(), "x_scale and x_zero_point must be given together");
  RunArgs args{};
  args.op = op;
  args.quantizer.x_bits = static_cast<int32_t>(x_bits);
  args.quantizer.parameters = x_bits > 0 ? cuda::kDynamic : cuda::kNoParameters;
  if (x_scale.has_value()) {
    CORA_CHECK(op, x_bits > 0, "x_scale must be None when x_bits is 0");
    check_dtype(op, "x_scale", *x_scale, ScalarType::Float);
    check_dtype(op, "x_zero_point", *x_zero_point, ScalarType::Int);
    CORA_CHECK(op, x_scale->numel() == 1, "x_scale must have 1 element, got shape ", shape_text(*x_scale));
    CORA_CHECK(op, x_zero_point->numel() == 1, "x_zero_point must have 1 element, got shape ",
               shape_text(*x_zero_point));
    check_same_device(op, "x_scale", *x_scale, x);
    check_same_device(op, "x_zero_point", *x_zero_point, x);
    args.quantizer.parameters = cuda::kOnDevice;
    args.quantizer.scale = data<float>(*x_scale);
    args.quantizer.zero_point = data<int32_t>(*x_zero_point);
  }
  return run(args, shape, g.linear, x, prepare(op, o, shape));
}

Tensor linear_lowrank_cuda(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits, OptTensor a,
                           OptTensor b, OptTensor adapter_scale, OptTensor bias, OptTensor x_scale,
                           OptTensor x_zero_point, int64_t x_bits) {
  const char* op = "linear_lowrank";
  CORA_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got shape []");
  const Geometry g = make_geometry(op, x.size(x.dim() - 1), {}, {}, {}, {}, 1);
  return run_once(op, g, x, {weight, scale, zero_point, a, b, adapter_scale, bias}, bits, x_scale, x_zero_point, x_bits);
}

Tensor conv2d_lowrank_cuda(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits,
                           std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                           std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                           OptTensor adapter_scale, OptTensor bias, OptTensor x_scale, OptTensor x_zero_point,
                           int64_t x_bits) {
  const char* op = "conv2d_lowrank";
  CORA_CHECK(op, x.dim() == 4, "x must have 4 dimensions, got shape ", shape_text(x));
  check_pair(op, "kernel_size", kernel_size, 1);
  const Geometry g = make_geometry(op, x.size(1), kernel_size, stride, padding, dilation, groups);
  return run_once(op, g, x, {weight, scale, zero_point, a, b, adapter_scale, bias}, bits, x_scale, x_zero_point, x_bits);
}

}  // namespace

CORA_CUDA_LIBRARY(m) {
  m.impl("prepare_layer", TORCH_BOX(&prepare_layer_cuda));
  m.impl("run_layer", TORCH_BOX(&run_layer_cuda));
  m.impl("linear_lowrank", TORCH_BOX(&linear_lowrank_cuda));
  m.impl("conv2d_lowrank", TORCH_BOX(&conv2d_lowrank_cuda));
}

}  // namespace cora
