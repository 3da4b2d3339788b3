// cora::conv2d_lowrank: y = conv(x, What) + conv1x1(conv(x, A) * adapter_scale, B) + bias.
#include "ops/layer.h"

namespace cora {

namespace {

/// Strides of a dense channels-last tensor; sizes of 1 may have any stride.
bool is_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t wanted[4] = {h * w * c, 1, w * c, c};
  for (int d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != wanted[d]) return false;
  return true;
}

void check_pair(const char* op, const char* name, const std::vector<int64_t>& v, int64_t least) {
  CORA_CHECK(op, v.size() == 2, name, " must have 2 elements, got ", v.size());
  CORA_CHECK(op, v[0] >= least && v[1] >= least, name, " must be >= ", least, ", got [", v[0], ", ", v[1], "]");
}

Tensor conv2d_lowrank_cpu(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits,
                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, OptTensor a, OptTensor b,
                          OptTensor adapter_scale, OptTensor bias, OptTensor x_scale, OptTensor x_zero_point,
                          int64_t x_bits) {
  const char* op = "conv2d_lowrank";
  CORA_CHECK(op, x.dim() == 4, "x must have 4 dimensions, got shape ", shape_text(x));
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  Window window{};
  window.batch = x.size(0);
  window.channels = x.size(1);
  window.groups = groups;
  for (int d = 0; d < 2; ++d) {
    window.size[d] = x.size(2 + d);
    window.kernel[d] = kernel_size[d];
    window.stride[d] = stride[d];
    window.padding[d] = padding[d];
    window.dilation[d] = dilation[d];
  }
  CORA_CHECK(op, groups >= 1 && window.channels % groups == 0, "groups must divide the ", window.channels,
             " channels, got ", groups);
  check_packed(op, "weight", weight, scale, zero_point, bits, window.k());
  const int64_t n = weight.size(0);
  CORA_CHECK(op, n % groups == 0, "groups must divide the ", n, " rows of weight, got ", groups);
  LayerArgs args{op, x, weight, scale, zero_point, bits, a, b, adapter_scale, bias, x_scale, x_zero_point, x_bits};
  check_layer(args, n, window.k(), groups);
  for (int d = 0; d < 2; ++d)
    CORA_CHECK(op, window.padded(d) >= window.reach(d), "x's padded height and width must be at least ",
               window.reach(d), " along dimension ", 2 + d, ", got ", window.padded(d));

  const bool channels_last = !x.is_contiguous() && is_channels_last(x);
  args.x = to_dtype(channels_last ? x : as_contiguous(x), ScalarType::Float);
  const std::vector<int64_t> shape{window.batch, n, window.out(0), window.out(1)};
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  Tensor y = torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float, std::nullopt, std::nullopt,
                                  std::nullopt, format);
  float* out = mutable_data<float>(y);
  if (channels_last || window.pixels() == 1) {
    run_layer(args, window, !channels_last, out);
  } else {
    Buffer<float> rows(window.rows() * n);
    run_layer(args, window, true, rows.get());
    const int64_t pixels = window.pixels(), step = 256;
    const int64_t pieces = (pixels + step - 1) / step;
    parallel_for(window.batch * pieces, std::max<int64_t>(1, 16384 / (step * n)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / pieces, p = i % pieces * step;
        cpu::k_transpose()(rows.get() + (image * pixels + p) * n, n, std::min(step, pixels - p), n,
                           out + image * n * pixels + p, pixels);
      }
    });
  }
  return to_dtype(y, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) { m.impl("conv2d_lowrank", TORCH_BOX(&conv2d_lowrank_cpu)); }

}  // namespace cora
