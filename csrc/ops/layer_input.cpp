// x -> padded, channels last, quantised. The real value 0 is the padding: code zero_point.
#include "ops/layer.h"

#include <atomic>
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
    zero[b] = static_cast<int32_t>(std::clamp(std::nearbyint(-lo / scale[b]), 0.0f, top));
  }
}

/// Calls line(image, y, out) for every line of the padded input, `out` at its first pixel; fills the padding.
template <typename X, typename Line>
void for_padded_lines(const LayerInput<X>& in, const Window& w, const Line& line) {
  const int64_t row = w.size[1] * in.pixel, lines = w.padded(0), side = w.padding[1] * in.pixel;
  parallel_for(w.batch * lines, std::max<int64_t>(1, kChunk / in.line), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / lines, h = i % lines - w.padding[0];
      X zero = 0;
      if constexpr (std::is_same_v<X, uint8_t>) zero = static_cast<X>(in.zero[b]);
      X* out = in.storage.get() + i * in.line;
      const bool outside = h < 0 || h >= w.size[0];
      for (int p = 0; p < in.planes; ++p) {
        X* plane = out + p * in.plane;
        std::fill_n(plane, outside ? in.line : side, zero);
        if (!outside) std::fill_n(plane + side + row, side, zero);
      }
      if (!outside) line(b, h, out + side);
    }
  });
}

}  // namespace

template <typename X>
LayerInput<X> prepare_input(const Tensor& x, const Layer& layer, const Window& w, const RunArgs& args, bool nchw) {
  constexpr bool kCodes = std::is_same_v<X, uint8_t>;
  const int64_t c = w.channels, plane = w.size[0] * w.size[1];
  nchw = nchw && plane > 1 && c > 1;
  LayerInput<X> in{};
  in.pixel = c;
  if constexpr (kCodes) {
    in.scale = Buffer<float>(w.batch);
    in.zero = Buffer<int32_t>(w.batch);
    if (args.x_scale.has_value()) {
      std::fill_n(in.scale.get(), w.batch, static_cast<float>(*args.x_scale));
      std::fill_n(in.zero.get(), w.batch, static_cast<int32_t>(args.x_zero_point));
    } else {
      dynamic_qparams(data<float>(x), w.batch, c * plane, static_cast<float>(max_code(static_cast<int>(args.x_bits))),
                      in.scale, in.zero);
      in.uniform = w.batch == 1;
    }
  }

  if (x.scalar_type() == ScalarType::Byte || (!kCodes && !nchw)) {  // the right order already
    const int64_t halo = args.x_halo;
    const X* first = data<X>(x);
    const int64_t line = (w.size[1] + 2 * halo) * c, image = (w.size[0] + 2 * halo) * line;
    // Read in place where its border is wide enough and no kernel reads past its end.
    const bool aligned =
        !kCodes || layer.h->depthwise ||
        (layer.segment_run() % cpu::tile_shape(cpu::active_isa()).align == 0 && layer.h->walk != Walk::kColumns);
    if (halo >= w.padding[0] && halo >= w.padding[1] && aligned) {
      in.line = line;
      in.image = image;
      in.x = first + (halo - w.padding[0]) * line + (halo - w.padding[1]) * c;
      return in;
    }
    if (!kCodes && layer.h->depthwise) {
      in.line = line;
      in.image = image;
      in.x = first;
      std::copy_n(w.padding, 2, in.absent);
      return in;
    }
    in.line = w.padded(1) * c;
    in.image = w.padded(0) * in.line;
    in.storage = Buffer<X>(w.batch * in.image);
    for_padded_lines(in, w, [&](int64_t b, int64_t h, X* out) {
      std::copy_n(first + b * image + (h + halo) * line + halo * c, w.size[1] * c, out);
    });
  } else {
    in.line = w.padded(1) * c;
    in.image = w.padded(0) * in.line;
    in.storage = Buffer<X>(w.batch * in.image);
    const float* first = data<float>(x);
    const int64_t row = w.size[1] * c;
    if constexpr (kCodes) {
      const float top = static_cast<float>(max_code(static_cast<int>(args.x_bits)));
      for_padded_lines(in, w, [&](int64_t b, int64_t h, X* out) {
        const cpu::RunParams params{in.scale[b], static_cast<float>(in.zero[b]), top};
        if (nchw)
          cpu::k_quantize_transpose()(first + b * c * plane + h * w.size[1], plane, c, w.size[1], params, out, c);
        else
          cpu::k_quantize_u8()(first + (b * plane + h * w.size[1]) * c, params, row, out);
      });
    } else {
      for_padded_lines(in, w, [&](int64_t b, int64_t h, X* out) {
        cpu::k_transpose()(first + b * c * plane + h * w.size[1], plane, c, w.size[1], out, c);
      });
    }
  }
  in.x = in.storage.get();
  return in;
}

LayerInput<cpu::Bf16> prepare_planes(const Tensor& x, const Layer& layer, const Window& w, int planes, bool nchw) {
  // What is read together, a block's pixels and their planes, should not lie a multiple of many cache lines
  // apart: it would fall into few sets of the cache. Where runs do not cross pixels, those are spread.
  constexpr int64_t kLine = 32, kSets = 64 * kLine, kSkew = 5 * kLine;
  const int64_t c = w.channels, plane = w.size[0] * w.size[1], row = w.size[1] * c;
  nchw = nchw && plane > 1 && c > 1;
  LayerInput<cpu::Bf16> in{};
  const bool spread = layer.h->walk == Walk::kTaps && c % (8 * kLine) == 0;
  in.pixel = spread ? c + kLine : c;
  in.line = w.padded(1) * in.pixel;
  in.image = w.padded(0) * in.line;
  in.planes = planes;
  in.plane = (w.batch * in.image + kSets - 1) / kSets * kSets + kSkew;
  in.storage = Buffer<cpu::Bf16>(planes * in.plane);
  for (int p = 0; p < planes; ++p)  // what follows a plane is multiplied by zeros, so it must be finite
    std::fill_n(in.storage.get() + p * in.plane + w.batch * in.image, kLine, cpu::Bf16{0});
  in.x = in.storage.get();
  const float* first = data<float>(x);
  std::atomic<bool> in_range{true};
  for_padded_lines(in, w, [&](int64_t b, int64_t h, cpu::Bf16* out) {
    const float* line = first + (b * plane + h * w.size[1]) * c;
    Buffer<float> pixels(nchw ? row : 0);
    if (nchw) {
      cpu::k_transpose()(first + b * c * plane + h * w.size[1], plane, c, w.size[1], pixels.get(), c);
      line = pixels.get();
    }
    const int64_t pieces = spread ? w.size[1] : 1, piece = row / pieces;
    for (int64_t i = 0; i < pieces; ++i, out += in.pixel) {
      if (!cpu::k_split()(line + i * piece, piece, planes, in.plane, out)) in_range = false;
      for (int p = 0; p < planes && spread; ++p) std::fill_n(out + p * in.plane + c, kLine, cpu::Bf16{0});
    }
  });
  in.in_range = in_range;
  return in;
}

template LayerInput<float> prepare_input(const Tensor&, const Layer&, const Window&, const RunArgs&, bool);
template LayerInput<uint8_t> prepare_input(const Tensor&, const Layer&, const Window&, const RunArgs&, bool);

}  // namespace cora
