// cora::quantize_activation, dequantize_activation: between float activations and the codes that quantized layers
// hand to each other, uint8 channels_last with a border of `halo` pixels that hold the code of the real value 0.
#include "bits.h"
#include "check.h"
#include "cpu/kernels.h"

#include <algorithm>

namespace cora {

namespace {

constexpr int64_t kGrain = 16384;  // elements a task

/// An image as the kernels see it; a tensor that is none is one line of its elements.
struct Image {
  int64_t batch = 1, channels = 1, height = 1, width;
  explicit Image(const Tensor& t) : width(t.numel()) {
    if (t.dim() == 4) batch = t.size(0), channels = t.size(1), height = t.size(2), width = t.size(3);
  }
  int64_t line() const { return channels * width; }
};

std::vector<int64_t> bordered(const Tensor& t, int64_t border) {
  std::vector<int64_t> shape = sizes_of(t);
  if (t.dim() == 4) shape[2] += 2 * border, shape[3] += 2 * border;
  return shape;
}

Tensor empty_image(const std::vector<int64_t>& shape, ScalarType dtype) {
  const auto layout =
      shape.size() == 4 ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty({shape.data(), shape.size()}, dtype, std::nullopt, std::nullopt, std::nullopt, layout);
}

Tensor quantize_activation_cpu(Tensor x, double scale, int64_t zero_point, int64_t bits, int64_t halo) {
  const char* op = "quantize_activation";
  check_bits(op, bits);
  check_float(op, "x", x);
  const int top = max_code(static_cast<int>(bits));
  check_activation(op, "x", x, scale, zero_point, top, halo);
  const Tensor xf = to_dtype(x, ScalarType::Float);
  const Image image(x);
  const bool last = is_channels_last(xf), transpose = x.dim() == 4 && !last && image.channels > 1;
  const Tensor source = last ? xf : as_contiguous(xf);
  Tensor out = empty_image(bordered(x, halo), ScalarType::Byte);
  if (out.numel() == 0) return out;

  const auto quantize = cpu::k_quantize_u8();
  const auto turn = cpu::k_quantize_transpose();
  const cpu::RunParams p{static_cast<float>(scale), static_cast<float>(zero_point), static_cast<float>(top)};
  const auto zero = static_cast<uint8_t>(zero_point);
  const float* from = data<float>(source);
  uint8_t* to = mutable_data<uint8_t>(out);
  const int64_t plane = image.height * image.width, side = halo * image.channels;
  const int64_t lines = image.height + 2 * halo, stride = image.line() + 2 * side;
  if (x.dim() != 4) {
    parallel_for(x.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { quantize(from + begin, p, end - begin, to + begin); });
    return out;
  }
  parallel_for(image.batch * lines, kGrain / stride, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / lines, h = i % lines - halo;
      uint8_t* line = to + i * stride;
      if (h < 0 || h >= image.height) {
        std::fill_n(line, stride, zero);
        continue;
      }
      std::fill_n(line, side, zero);
      if (transpose)
        turn(from + b * image.channels * plane + h * image.width, plane, image.channels, image.width, p, line + side,
             image.channels);
      else
        quantize(from + (b * image.height + h) * image.line(), p, image.line(), line + side);
      std::fill_n(line + stride - side, side, zero);
    }
  });
  return out;
}

Tensor dequantize_activation_cpu(Tensor codes, double scale, int64_t zero_point, int64_t halo) {
  const char* op = "dequantize_activation";
  check_dtype(op, "codes", codes, ScalarType::Byte);
  check_activation(op, "codes", codes, scale, zero_point, max_code(kMaxBits), halo);
  const Image image(codes);
  CORA_CHECK(op, codes.dim() != 4 || (image.height >= 2 * halo && image.width >= 2 * halo),
             "codes must hold the border of ", halo, " pixels, got shape ", shape_text(codes));
  CORA_CHECK(op, codes.dim() != 4 || is_channels_last(codes) || codes.numel() == 0,
             "codes must be channels_last, got another layout");
  const Tensor source = codes.dim() == 4 ? codes : as_contiguous(codes);
  Tensor out = empty_image(bordered(codes, -halo), ScalarType::Float);
  if (out.numel() == 0) return out;

  const auto dequantize = cpu::k_dequantize();
  const auto s = static_cast<float>(scale);
  const auto z = static_cast<int32_t>(zero_point);
  const uint8_t* from = data<uint8_t>(source);
  float* to = mutable_data<float>(out);
  if (codes.dim() != 4) {
    parallel_for(codes.numel(), kGrain,
                 [&](int64_t begin, int64_t end) { dequantize(from + begin, s, z, end - begin, to + begin); });
    return out;
  }
  const int64_t height = image.height - 2 * halo, row = (image.width - 2 * halo) * image.channels;
  parallel_for(image.batch * height, kGrain / row, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t line = i / height * image.height + i % height + halo;
      dequantize(from + line * image.line() + halo * image.channels, s, z, row, to + i * row);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_cpu));
  m.impl("dequantize_activation", TORCH_BOX(&dequantize_activation_cpu));
}

}  // namespace cora
