// x -> padded, channels last, quantised. The real value 0 is the padding: code zero_point.
#include "ops/layer.h"

#include <cmath>
#include <type_traits>

namespace cora {

namespace {

constexpr int64_t kChunk = 16384;  // elements a task of the range search

/// Dynamic ranges, one an image: scale and zero-point of min(x, 0)..max(x, 0).
void dynamic_qparams(const float* x, int64_t batch, int64_t count, float top, Buffer<float>& scale,
                     Buffer<int32_t>& zero) {
  const auto range = cpu::k_range();
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  Buffer<float> low(batch * chunks), high(batch * chunks);
  parallel_for(batch * chunks, std::max<int64_t>(1, kChunk / count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % chunks * kChunk;
      range(x + i / chunks * count + start, std::min(kChunk, count - start), &low[i], &high[i]);
    }
  });
  for (int64_t b = 0; b < batch; ++b) {
    const float lo = *std::min_element(&low[b * chunks], &low[b * chunks] + chunks);
    const float hi = *std::max_element(&high[b * chunks], &high[b * chunks] + chunks);
    const float step = (hi - lo) / top;
    scale[b] = step > 0 ? step : 1.0f;
    zero[b] = static_cast<int32_t>(std::clamp(std::nearbyint(-lo / scale[b]), 0.0f, top)) - 128;
  }
}

}  // namespace

template <typename T>
LayerInput<T> prepare_input(const LayerArgs& args, const Window& w, bool nchw) {
  constexpr bool kQuantised = std::is_same_v<T, int8_t>;
  const float* x = data<float>(args.x);
  const int64_t c = w.channels, plane = w.size[0] * w.size[1];
  nchw = nchw && plane > 1 && c > 1;
  LayerInput<T> in{};
  in.pixel = c;
  in.line = w.padded(1) * c;
  in.image = w.padded(0) * in.line;

  const float top = static_cast<float>(kQuantised ? max_code(static_cast<int>(args.x_bits)) : 0);
  if constexpr (kQuantised) {
    in.scale = Buffer<float>(w.batch);
    in.zero = Buffer<int32_t>(w.batch);
    if (args.x_scale.has_value()) {
      std::fill_n(in.scale.get(), w.batch, *data<float>(*args.x_scale));
      std::fill_n(in.zero.get(), w.batch, *data<int32_t>(*args.x_zero_point) - 128);
    } else {
      dynamic_qparams(x, w.batch, c * plane, top, in.scale, in.zero);
    }
  } else if (!nchw && w.padding[0] == 0 && w.padding[1] == 0) {
    in.x = x;
    return in;
  }

  in.storage = Buffer<T>(w.batch * in.image);
  in.x = in.storage.get();
  const auto transpose = cpu::k_transpose();
  const auto quantize = cpu::k_quantize_s8();
  const int64_t row = w.size[1] * c, lines = w.padded(0), side = w.padding[1] * c;
  parallel_for(w.batch * lines, std::max<int64_t>(1, kChunk / in.line), [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(kQuantised && nchw ? row : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / lines, h = i % lines - w.padding[0];
      T zero = 0;
      if constexpr (kQuantised) zero = static_cast<T>(in.zero[b]);
      T* out = in.storage.get() + i * in.line;
      if (h < 0 || h >= w.size[0]) {
        std::fill_n(out, in.line, zero);
        continue;
      }
      std::fill_n(out, side, zero);
      std::fill_n(out + side + row, side, zero);
      const float* from = nchw ? x + b * c * plane + h * w.size[1] : x + (b * plane + h * w.size[1]) * c;
      if constexpr (kQuantised) {
        if (nchw) {
          transpose(from, plane, c, w.size[1], scratch.get(), c);
          from = scratch.get();
        }
        quantize(from, {in.scale[b], static_cast<float>(in.zero[b] + 128), top}, row, out + side);
      } else if (nchw) {
        transpose(from, plane, c, w.size[1], out + side, c);
      } else {
        std::copy_n(from, row, out + side);
      }
    }
  });
  return in;
}

template LayerInput<float> prepare_input(const LayerArgs&, const Window&, bool);
template LayerInput<int8_t> prepare_input(const LayerArgs&, const Window&, bool);

}  // namespace cora
