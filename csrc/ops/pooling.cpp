// cora::max_pool2d_codes, mean_codes: pooling of uint8 codes, channels_last with a border of `halo` pixels. The order
// of codes is that of the numbers they stand for, so a maximum needs no scale; a border is no part of any window.
// cora::mean_pixels: the mean of floats.
#include "ops/pooling.h"

#include "cpu/kernels.h"

#include <algorithm>

namespace cora {

namespace {

constexpr int64_t kGrain = 65536;  // bytes read by a task

/// Codes without their border: first pixel, and strides in bytes.
struct Codes {
  Tensor held;
  const uint8_t* first;
  int64_t batch, channels, height, width, image, line;

  Codes(const char* op, const Tensor& x, int64_t zero_point, int64_t halo) {
    check_dtype(op, "x", x, ScalarType::Byte);
    CORA_CHECK(op, x.dim() == 4, "x must have 4 dimensions, got shape ", shape_text(x));
    check_code(op, "zero_point", zero_point, 255);
    CORA_CHECK(op, halo >= 0, "halo must be >= 0, got ", halo);
    height = x.size(2) - 2 * halo;
    width = x.size(3) - 2 * halo;
    CORA_CHECK(op, height >= 1 && width >= 1, "x must hold pixels inside a border of ", halo, ", got shape ",
               shape_text(x));
    held = is_channels_last(x) ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
    batch = x.size(0);
    channels = x.size(1);
    line = x.size(3) * channels;
    image = x.size(2) * line;
    first = data<uint8_t>(held) + halo * (line + channels);
  }
};

/// Windows along one dimension, counted as torch does: in ceil mode the last may hang over the end.
int64_t windows(int64_t size, int64_t reach, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t room = size + 2 * padding - reach + (ceil_mode ? stride - 1 : 0);
  if (room < 0) return 0;
  const int64_t count = room / stride + 1;
  return ceil_mode && (count - 1) * stride >= size + padding ? count - 1 : count;
}

/// The taps of a window at `start` that lie within [0, size).
struct Taps {
  int64_t begin, end;
  Taps(int64_t start, int64_t size, int64_t kernel, int64_t dilation)
      : begin(start < 0 ? (-start + dilation - 1) / dilation : 0),
        end(std::min(kernel, start < size ? (size - start + dilation - 1) / dilation : 0)) {}
};

/// cpu::MaxRunsFn, and 0 without taps: a dilated window can miss a small image.
void max_runs(const uint8_t* x, int64_t taps, int64_t step, int64_t run, int64_t count, int64_t ldx, uint8_t* y) {
  if (taps > 0)
    cpu::k_max_runs()(x, taps, step, run, count, ldx, run, y);
  else
    std::fill_n(y, run * count, uint8_t{0});
}

}  // namespace

Tensor max_pool2d_codes(Tensor x, int64_t zero_point, int64_t x_halo, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                        bool ceil_mode, int64_t out_halo) {
  const char* op = "max_pool2d_codes";
  const Codes in(op, x, zero_point, x_halo);
  check_window(op, kernel_size, stride, padding, dilation);
  CORA_CHECK(op, out_halo >= 0, "out_halo must be >= 0, got ", out_halo);
  const int64_t size[2] = {in.height, in.width};
  int64_t count[2];
  for (int d = 0; d < 2; ++d) {
    CORA_CHECK(op, 2 * padding[d] <= kernel_size[d], "padding must be at most half of kernel_size, got ", padding[d],
               " and ", kernel_size[d]);
    count[d] = windows(size[d], dilation[d] * (kernel_size[d] - 1) + 1, stride[d], padding[d], ceil_mode);
    CORA_CHECK(op, count[d] >= 1, "x must be at least as large as a window along dimension ", 2 + d, ", got ", size[d]);
  }
  const int64_t c = in.channels, lines = count[0] + 2 * out_halo, line = (count[1] + 2 * out_halo) * c;
  const std::vector<int64_t> shape{in.batch, c, lines, count[1] + 2 * out_halo};
  Tensor y = torch::stable::empty({shape.data(), shape.size()}, ScalarType::Byte, std::nullopt, std::nullopt,
                                  std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  const auto zero = static_cast<uint8_t>(zero_point);
  uint8_t* to = mutable_data<uint8_t>(y);
  const int64_t work = kernel_size[0] * kernel_size[1] * line;
  parallel_for(in.batch * lines, kGrain / std::max<int64_t>(work, 1), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> tallest(static_cast<size_t>(in.width * c));  // a window's rows as one
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* out = to + i * line;
      const int64_t b = i / lines, top = (i % lines - out_halo) * stride[0] - padding[0];
      if (i % lines < out_halo || i % lines >= out_halo + count[0]) {
        std::fill_n(out, line, zero);
        continue;
      }
      out = std::fill_n(out, out_halo * c, zero);
      const Taps rows(top, in.height, kernel_size[0], dilation[0]);
      max_runs(in.first + b * in.image + (top + rows.begin * dilation[0]) * in.line, rows.end - rows.begin,
               dilation[0] * in.line, in.width * c, 1, 0, tallest.data());
      for (int64_t w = 0; w < count[1];) {
        const int64_t left = w * stride[1] - padding[1];
        const Taps columns(left, in.width, kernel_size[1], dilation[1]);
        // Windows that see all their columns are done together.
        const int64_t room = in.width - (left + (kernel_size[1] - 1) * dilation[1] + 1);
        const int64_t some = left < 0 || room < 0 ? 1 : std::min(room / stride[1] + 1, count[1] - w);
        max_runs(tallest.data() + (left + columns.begin * dilation[1]) * c, columns.end - columns.begin,
                 dilation[1] * c, c, some, stride[1] * c, out);
        w += some;
        out += some * c;
      }
      std::fill_n(out, out_halo * c, zero);
    }
  });
  return y;
}

Tensor mean_codes(Tensor x, double scale, int64_t zero_point, int64_t x_halo) {
  const char* op = "mean_codes";
  const Codes in(op, x, zero_point, x_halo);
  check_scale(op, "scale", scale);
  Tensor y = empty({in.batch, in.channels}, ScalarType::Float);
  float* to = mutable_data<float>(y);
  const int64_t pixels = in.height * in.width, zero = zero_point * pixels;
  const double unit = static_cast<double>(static_cast<float>(scale)) / static_cast<double>(pixels);
  constexpr int64_t kBlock = 256;  // channels a task sums at once
  const int64_t blocks = (in.channels + kBlock - 1) / kBlock;
  parallel_for(in.batch * blocks, kGrain / (kBlock * pixels), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, at = i % blocks * kBlock, count = std::min(kBlock, in.channels - at);
      int64_t total[kBlock] = {};
      for (int64_t h = 0; h < in.height; ++h) {
        const uint8_t* from = in.first + b * in.image + h * in.line + at;
        // A row of up to 2^24 pixels fits 32 bits; the vector is then twice as wide.
        uint32_t sum[kBlock] = {};
        for (int64_t w = 0; w < in.width; ++w, from += in.channels)
          for (int64_t n = 0; n < count; ++n) sum[n] += from[n];
        for (int64_t n = 0; n < count; ++n) total[n] += sum[n];
      }
      float* out = to + b * in.channels + at;
      for (int64_t n = 0; n < count; ++n) out[n] = static_cast<float>(unit * static_cast<double>(total[n] - zero));
    }
  });
  return y;
}

Tensor mean_pixels(Tensor x) {
  const char* op = "mean_pixels";
  const ScalarType dtype = x.scalar_type();
  check_float(op, "x", x);
  CORA_CHECK(op, x.dim() == 4, "x must have 4 dimensions, got shape ", shape_text(x));
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  CORA_CHECK(op, height >= 1 && width >= 1, "x must hold pixels, got shape ", shape_text(x));
  const Tensor floats = to_dtype(x, ScalarType::Float);
  Tensor y = empty({batch, channels}, ScalarType::Float);
  float* to = mutable_data<float>(y);
  const float* first = data<float>(floats);
  const int64_t image = floats.stride(0), channel = floats.stride(1), line = floats.stride(2), pixel = floats.stride(3);
  const double pixels = static_cast<double>(height * width);
  constexpr int64_t kBlock = 256;  // channels a task sums at once
  const int64_t blocks = (channels + kBlock - 1) / kBlock;
  parallel_for(batch * blocks, kGrain / (4 * kBlock * height * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, at = i % blocks * kBlock, count = std::min(kBlock, channels - at);
      double total[kBlock] = {};
      for (int64_t h = 0; h < height; ++h) {
        const float* from = first + b * image + at * channel + h * line;
        for (int64_t w = 0; w < width; ++w, from += pixel)
          for (int64_t n = 0; n < count; ++n) total[n] += static_cast<double>(from[n * channel]);
      }
      float* out = to + b * channels + at;
      for (int64_t n = 0; n < count; ++n) out[n] = static_cast<float>(total[n] / pixels);
    }
  });
  return to_dtype(y, dtype);
}

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) {
  m.impl("max_pool2d_codes", TORCH_BOX(&max_pool2d_codes));
  m.impl("mean_codes", TORCH_BOX(&mean_codes));
  m.impl("mean_pixels", TORCH_BOX(&mean_pixels));
}

}  // namespace cora
