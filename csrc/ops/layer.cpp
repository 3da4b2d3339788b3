// The order of the steps when a packed layer is run.
#include "ops/layer.h"

namespace cora {

namespace {

constexpr int64_t kShortestPlaneRun = 16;  // of 32 elements of K that bfloat16 multiplications take
constexpr int64_t kFewestPlaneUses = 48;   // products an element must take part in for splitting it to pay

Tensor channels_last(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

/// The layer's geometry, its batch and size left open.
Window window_of(const LayerHeader& h) {
  Window w{};
  w.linear = h.linear;
  w.channels = h.channels;
  w.groups = h.groups;
  for (int d = 0; d < 2; ++d) {
    w.kernel[d] = h.kernel[d];
    w.stride[d] = h.stride[d];
    w.padding[d] = h.padding[d];
    w.dilation[d] = h.dilation[d];
  }
  return w;
}

/// The border of a batch of images of `line` bytes a row.
void fill_halo(uint8_t* y, const Window& w, int64_t n, int64_t halo, uint8_t zero) {
  const int64_t line = (w.out(1) + 2 * halo) * n, lines = w.out(0) + 2 * halo;
  parallel_for(w.batch * lines, 65536 / (2 * halo * n), [&](int64_t begin, int64_t end) {
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
  // Lines that are interleaved are split and copied for every row; a transposition splits on its way.
  const bool copied = h.walk == Walk::kColumns;
  const int64_t kernels = copied ? 1 : h.kernel[0] * h.kernel[1], strides = copied ? 1 : h.stride[0] * h.stride[1];
  if (!h.linear && (copied || !nchw) && h.n / h.groups * kernels / strides < kFewestPlaneUses) return false;
  // Bits of the significand, eight a plane.
  const int planes = dtype == ScalarType::BFloat16 ? 1 : dtype == ScalarType::Half ? 2 : 3;
  const LayerInput<cpu::Bf16> input = prepare_planes(x, layer, w, planes, nchw);
  if (input.in_range) run_tiles(layer, w, input, out);
  return input.in_range;
}

}  // namespace

Tensor run_layer(const Tensor& x, const Layer& layer, const RunArgs& args) {
  const LayerHeader& h = *layer.h;
  const Window w = check_run(x, window_of(h), h.n, args);
  const bool x_codes = x.scalar_type() == ScalarType::Byte, codes = args.out_scale.has_value();
  const int64_t n = h.n, halo = args.out_halo;
  const bool x_nhwc = h.linear || x_codes || prefers_channels_last(x);
  const bool y_nhwc = h.linear || codes || x_nhwc || w.pixels() == 1;
  const std::vector<int64_t> shape = output_shape(x, w, n, halo);
  // Over what is added, code by code: that is in the cache already, memory for the result may not be.
  const bool over = args.in_place && codes && !h.linear && args.add->scalar_type() == ScalarType::Byte &&
                    args.add_halo == halo && is_channels_last(*args.add);
  const bool strided = !h.linear && (codes || x_nhwc);
  Tensor y = over ? *args.add
                  : torch::stable::empty({shape.data(), shape.size()}, codes ? ScalarType::Byte : ScalarType::Float,
                                         std::nullopt, std::nullopt, std::nullopt,
                                         strided ? torch::headeronly::MemoryFormat::ChannelsLast
                                                 : torch::headeronly::MemoryFormat::Contiguous);
  const ScalarType dtype = x_codes ? ScalarType::Float : x.scalar_type();
  OptTensor add;
  if (args.add.has_value()) {
    add = args.add->scalar_type() == ScalarType::Byte ? *args.add : to_dtype(*args.add, ScalarType::Float);
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
  e.bound_codes();
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
