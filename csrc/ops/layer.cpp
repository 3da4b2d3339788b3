// Checks of a packed layer's operands, and the order of the steps when one is run.
#include "ops/layer.h"

#include <cmath>

namespace cora {

namespace {

constexpr int64_t kShortestPlaneRun = 16;  // of 32 elements of K that bfloat16 multiplications take
constexpr int64_t kFewestPlaneUses = 48;   // products an element must take part in for splitting it to pay

Tensor channels_last(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

Window window_of(const Tensor& x, const LayerHeader& h, const RunArgs& args) {
  const char* op = args.op;
  Window w{};
  if (h.linear) {
    CORA_CHECK(op, x.dim() >= 1 && x.size(x.dim() - 1) == h.channels, "x must have ", h.channels,
               " elements along its last dimension, got shape ", shape_text(x));
    w.batch = x.numel() / h.channels;
    w.channels = h.channels;
    w.size[0] = w.size[1] = 1;
    return w;
  }
  CORA_CHECK(op, x.dim() == 4, "x must have 4 dimensions, got shape ", shape_text(x));
  CORA_CHECK(op, x.size(1) == h.channels, "x must have ", h.channels, " channels, got shape ", shape_text(x));
  w.batch = x.size(0);
  w.channels = h.channels;
  w.groups = h.groups;
  for (int d = 0; d < 2; ++d) {
    w.size[d] = x.size(2 + d) - 2 * args.x_halo;
    w.kernel[d] = h.kernel[d];
    w.stride[d] = h.stride[d];
    w.padding[d] = h.padding[d];
    w.dilation[d] = h.dilation[d];
    CORA_CHECK(op, w.size[d] >= 0, "x_halo must be at most half of x's height and width, got ", args.x_halo);
    CORA_CHECK(op, w.padded(d) >= w.reach(d), "x's padded height and width must be at least ", w.reach(d),
               " along dimension ", 2 + d, ", got ", w.padded(d));
  }
  return w;
}

void check_code(const char* op, const char* name, int64_t code, int64_t top) {
  CORA_CHECK(op, code >= 0 && code <= top, name, " must be 0..", top, ", got ", code);
}
void check_scale(const char* op, const char* name, double scale) {
  const float value = static_cast<float>(scale);
  CORA_CHECK(op, std::isfinite(value) && value > 0, name, " must be finite and > 0, got ", scale);
}

void check_run(const Tensor& x, const LayerHeader& h, const RunArgs& v) {
  const char* op = v.op;
  const bool codes = x.scalar_type() == ScalarType::Byte;
  CORA_CHECK(op, codes || is_float(x.scalar_type()), "x must have dtype float32, float16, bfloat16 or uint8, got ",
             dtype_text(x.scalar_type()));
  CORA_CHECK(op, v.x_bits == 0 || (v.x_bits >= kMinBits && v.x_bits <= kMaxBits), "x_bits must be 0 or 2..8, got ",
             v.x_bits);
  CORA_CHECK(op, !codes || (v.x_bits > 0 && v.x_scale.has_value()), "x_scale and x_bits must be given with codes");
  CORA_CHECK(op, codes || v.x_halo == 0, "x_halo must be 0 unless x holds codes, got ", v.x_halo);
  CORA_CHECK(op, v.x_halo >= 0 && v.out_halo >= 0 && v.add_halo >= 0, "halos must be >= 0");
  if (v.x_scale.has_value()) {
    CORA_CHECK(op, v.x_bits > 0, "x_scale must be None when x_bits is 0");
    check_scale(op, "x_scale", *v.x_scale);
    check_code(op, "x_zero_point", v.x_zero_point, max_code(static_cast<int>(v.x_bits)));
  }
  // 255 * 128 * 2^16 is the last product sum that fits the int32 accumulators.
  CORA_CHECK(op, v.x_bits == 0 || h.taps * h.run <= 65536, "k must be <= 65536 with quantised input, got ",
             h.taps * h.run);
  CORA_CHECK(op, v.low <= v.high, "clamp_min must be <= clamp_max, got ", v.low, " and ", v.high);
  CORA_CHECK(op, v.out_scale.has_value() || v.out_halo == 0, "out_halo must be 0 for a float output, got ",
             v.out_halo);
  if (v.out_scale.has_value()) {
    check_scale(op, "out_scale", *v.out_scale);
    check_code(op, "out_zero_point", v.out_zero_point, 255);
  }
  if (h.linear)
    CORA_CHECK(op, v.x_halo == 0 && v.out_halo == 0 && v.add_halo == 0, "halos must be 0 for a linear layer");
}

/// The border of a batch of images of `line` bytes a row.
void fill_halo(uint8_t* y, const Window& w, int64_t n, int64_t halo, uint8_t zero) {
  const int64_t line = (w.out(1) + 2 * halo) * n, lines = w.out(0) + 2 * halo;
  parallel_for(w.batch * lines, std::max<int64_t>(1, 65536 / line), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* row = y + i * line;
      const int64_t at = i % lines;
      if (at < halo || at >= lines - halo) {
        std::fill_n(row, line, zero);
      } else {
        std::fill_n(row, halo * n, zero);
        std::fill_n(row + line - halo * n, halo * n, zero);
      }
    }
  });
}

/// rows [batch, pixels, n] -> y [batch, n, pixels]
void to_planes(const float* rows, int64_t batch, int64_t pixels, int64_t n, float* y) {
  const int64_t step = 256, pieces = (pixels + step - 1) / step;
  parallel_for(batch * pieces, std::max<int64_t>(1, 16384 / (step * n)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / pieces, p = i % pieces * step;
      cpu::k_transpose()(rows + (image * pixels + p) * n, n, std::min(step, pixels - p), n, y + image * n * pixels + p,
                         pixels);
    }
  });
}

/// A linear layer of so few rows that reading the weight is what it costs.
bool few_rows(const LayerHeader& h, const Window& w) {
  return h.linear && w.rows() <= cpu::kGemvM && h.walk == Walk::kTaps;
}

template <typename X>
void run_as(const Tensor& x, const Layer& layer, const Window& w, const RunArgs& args, bool nchw,
            const LayerOutput& out) {
  const LayerInput<X> input = prepare_input<X>(x, layer, w, args, nchw);
  const LayerHeader& h = *layer.h;
  const bool few = few_rows(h, w) && (h.narrow || std::is_same_v<X, float>);
  (h.depthwise ? run_depthwise<X> : few ? run_gemv<X> : run_tiles<X>)(layer, w, input, out);
}

/// Floats as bfloat16 planes: false, and nothing done, where that is slower or not exact.
bool run_planes(const Tensor& x, ScalarType dtype, const Layer& layer, const Window& w, bool nchw,
                const LayerOutput& out) {
  const LayerHeader& h = *layer.h;
  if (cpu::active_isa() != cpu::Isa::kAmx || !h.bf16 || h.adapter == AdapterKind::kFloat || h.depthwise ||
      few_rows(h, w) || layer.segment_run() < kShortestPlaneRun)
    return false;
  // Lines that are copied together are split and copied for every use; a transposition splits on its way.
  const bool copied = h.walk == Walk::kCopied;
  const int64_t kernels = copied ? 1 : h.kernel[0] * h.kernel[1], strides = copied ? 1 : h.stride[0] * h.stride[1];
  if (!h.linear && (copied || !nchw) && h.n / h.groups * kernels / strides < kFewestPlaneUses) return false;
  // Bits of the significand, eight a plane.
  const int planes = dtype == ScalarType::BFloat16 ? 1 : dtype == ScalarType::Half ? 2 : 3;
  const LayerInput<cpu::Bf16> input = prepare_planes(x, layer, w, planes, nchw);
  if (input.in_range) run_tiles(layer, w, input, out);
  return input.in_range;
}

}  // namespace

void check_layer(const LayerArgs& v, int64_t n, int64_t k, int64_t groups) {
  const char* op = v.op;
  CORA_CHECK(op, v.a.has_value() == v.b.has_value(), "a and b must be given together");
  if (v.a.has_value()) {
    const ScalarType type = v.a->scalar_type();
    CORA_CHECK(op, type == ScalarType::Char || is_float(type),
               "a must have dtype int8, float16, bfloat16 or float32, got ", dtype_text(type));
    check_dtype(op, "b", *v.b, type);
    CORA_CHECK(op, v.b->dim() == 2, "b must have 2 dimensions, got shape ", shape_text(*v.b));
    const int64_t rank = v.b->size(1);
    check_shape(op, "b", *v.b, {n, rank});
    check_shape(op, "a", *v.a, {groups * rank, k});
    if (type == ScalarType::Char) {
      CORA_CHECK(op, v.adapter_scale.has_value(), "adapter_scale must be given with an int8 adapter");
      check_dtype(op, "adapter_scale", *v.adapter_scale, ScalarType::Float);
      check_shape(op, "adapter_scale", *v.adapter_scale, {groups * rank});
    } else {
      CORA_CHECK(op, !v.adapter_scale.has_value(), "adapter_scale must be None with a float adapter");
    }
  } else {
    CORA_CHECK(op, !v.adapter_scale.has_value(), "adapter_scale must be None without an adapter");
  }
  if (v.bias.has_value()) {
    check_dtype(op, "bias", *v.bias, ScalarType::Float);
    check_shape(op, "bias", *v.bias, {n});
  }
}

Tensor run_layer(const Tensor& x, const Layer& layer, const RunArgs& args) {
  const LayerHeader& h = *layer.h;
  check_run(x, h, args);
  const Window w = window_of(x, h, args);
  const bool x_codes = x.scalar_type() == ScalarType::Byte, codes = args.out_scale.has_value();
  const int64_t n = h.n, halo = args.out_halo;
  const bool x_nhwc = h.linear || x_codes || (!x.is_contiguous() && is_channels_last(x));
  const bool y_nhwc = h.linear || codes || x_nhwc || w.pixels() == 1;
  std::vector<int64_t> shape{w.batch, n, w.out(0) + 2 * halo, w.out(1) + 2 * halo};
  if (h.linear) {
    shape = sizes_of(x);
    shape.back() = n;
  }
  const bool strided = !h.linear && (codes || x_nhwc);
  Tensor y = torch::stable::empty({shape.data(), shape.size()}, codes ? ScalarType::Byte : ScalarType::Float,
                                  std::nullopt, std::nullopt, std::nullopt,
                                  strided ? torch::headeronly::MemoryFormat::ChannelsLast
                                          : torch::headeronly::MemoryFormat::Contiguous);
  const ScalarType dtype = x_codes ? ScalarType::Float : x.scalar_type();
  OptTensor add;
  if (args.add.has_value()) {
    const ScalarType type = args.add->scalar_type();
    CORA_CHECK(args.op, type == ScalarType::Byte || is_float(type),
               "add must have dtype float32, float16, bfloat16 or uint8, got ", dtype_text(type));
    std::vector<int64_t> wanted = shape;
    if (!h.linear)
      for (int d = 0; d < 2; ++d) wanted[2 + d] = w.out(d) + 2 * args.add_halo;
    check_shape(args.op, "add", *args.add, wanted);
    add = type == ScalarType::Byte ? *args.add : to_dtype(*args.add, ScalarType::Float);
    add = h.linear ? as_contiguous(*add) : channels_last(*add);
  }
  if (w.rows() == 0 || n == 0) return codes ? y : to_dtype(y, dtype);

  const Tensor input = x_codes ? (h.linear ? as_contiguous(x) : channels_last(x))
                               : to_dtype(x_nhwc && !h.linear ? x : as_contiguous(x), ScalarType::Float);
  Buffer<float> rows(y_nhwc ? 0 : w.rows() * n);
  LayerOutput out{};
  out.pixel = out.add_pixel = n;
  out.line = (w.out(1) + 2 * halo) * n;
  out.image = (w.out(0) + 2 * halo) * out.line;
  out.add_line = (w.out(1) + 2 * args.add_halo) * n;
  out.add_image = (w.out(0) + 2 * args.add_halo) * out.add_line;
  cpu::Epilogue& e = out.epilogue;
  e.low = static_cast<float>(args.low);
  e.high = static_cast<float>(args.high);
  e.codes = codes;
  e.inverse_scale = codes ? static_cast<float>(1.0 / *args.out_scale) : 1.0f;
  e.zero_point = static_cast<int32_t>(args.out_zero_point);
  if (codes) {
    uint8_t* first = mutable_data<uint8_t>(y);
    if (halo > 0) fill_halo(first, w, n, halo, static_cast<uint8_t>(args.out_zero_point));
    e.y = first + halo * (out.line + n);
  } else {
    e.y = y_nhwc ? mutable_data<float>(y) : rows.get();
  }
  if (add.has_value()) {
    e.add_codes = add->scalar_type() == ScalarType::Byte;
    e.add_scale = static_cast<float>(args.add_scale);
    e.add_zero = static_cast<float>(args.add_zero_point);
    const int64_t first = args.add_halo * (out.add_line + n);
    e.add = e.add_codes ? static_cast<const void*>(data<uint8_t>(*add) + first)
                        : static_cast<const void*>(data<float>(*add) + first);
  }
  if (args.x_bits > 0)
    run_as<uint8_t>(input, layer, w, args, !x_nhwc, out);
  else if (!run_planes(input, dtype, layer, w, !x_nhwc, out))
    run_as<float>(input, layer, w, args, !x_nhwc, out);
  if (!y_nhwc) to_planes(rows.get(), w.batch, w.pixels(), n, mutable_data<float>(y));
  return codes ? y : to_dtype(y, dtype);
}

}  // namespace cora
