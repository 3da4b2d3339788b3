// Depthwise layers: each channel its own filter. Channels lie together in memory, so the vector runs
// over channels. A prepared depthwise layer holds, channels contiguous: codes [taps][channels] and, by
// scale group, scale and zero-point [segments][channels]; the adapter, of rank 0 or 1 (all a group of
// one row can use), as 8-bit codes with zero-point 128 or as floats [taps][channels]; its b [channels].
#include "ops/layer.h"

#include <type_traits>

namespace cora {

namespace {

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/// out[c] += the exact integer sums of one position, scale group by scale group.
void integer_sums(const Layer& layer, const uint8_t* const* rows, int32_t zx, float* out) {
  const LayerHeader& h = *layer.h;
  const int64_t c = h.channels, taps = h.taps / h.segments;
  for (int64_t s = 0; s < h.segments; ++s, rows += taps) {
    const uint8_t* codes = layer.at<uint8_t>(h.codes) + s * taps * c;
    const float* scale = layer.at<float>(h.scale) + s * c;
    const int32_t* zero = layer.at<int32_t>(h.zero_point) + s * c;
    if (h.narrow) {
      cpu::k_depthwise_s8()(rows, zx, codes, zero, scale, taps, c, out);
      continue;
    }
    for (int64_t n = 0; n < c; ++n) {  // far zero-points: the same in 64 bits
      int64_t sum = 0;
      for (int64_t t = 0; t < taps; ++t) sum += int64_t{rows[t][n] - zx} * (codes[t * c + n] - zero[n]);
      out[n] += static_cast<float>(sum) * scale[n];
    }
  }
}

/// Weights as floats [taps][channels].
void dequantize_filters(const Layer& layer, float* out) {
  const LayerHeader& h = *layer.h;
  const int64_t c = h.channels, taps = h.taps / h.segments;
  for (int64_t t = 0; t < h.taps; ++t)
    for (int64_t n = 0; n < c; ++n) {
      const int64_t s = t / taps * c + n;
      out[t * c + n] = layer.at<float>(h.scale)[s] *
                       static_cast<float>(layer.at<uint8_t>(h.codes)[t * c + n] - layer.at<int32_t>(h.zero_point)[s]);
    }
}

}  // namespace

void plan_depthwise(LayerHeader& h) {
  int64_t at = round_up(sizeof(LayerHeader), 64);
  const auto take = [&](int64_t bytes) {
    const int64_t from = at;
    at = round_up(at + bytes, 64);
    return from;
  };
  h.walk = Walk::kTaps;
  h.taps = h.kernel[0] * h.kernel[1];
  h.run = 1;
  const int64_t c = h.channels, filters = h.taps * c;
  h.codes = take(filters);
  h.scale = take(h.segments * c * 4);
  h.zero_point = take(h.segments * c * 4);
  h.bias = take(h.has_bias ? c * 4 : 0);
  h.a = take(h.rank * filters * (h.adapter == AdapterKind::kInt8 ? 1 : 4));
  h.a_scale = take(h.rank * c * 4);
  h.a_sum = take(h.rank * c * 4);  // zero-points of a's codes
  h.b = take(h.rank * c * 4);
  h.bytes = at;
}

void fill_depthwise(const LayerHeader& h, const LayerSource& source, uint8_t* blob) {
  const int64_t c = h.channels, taps = h.taps;
  const bool int8 = h.adapter == AdapterKind::kInt8;
  const auto array = [&](int64_t offset) { return reinterpret_cast<float*>(blob + offset); };
  const auto integers = [&](int64_t offset) { return reinterpret_cast<int32_t*>(blob + offset); };
  std::vector<uint8_t> codes(static_cast<size_t>(taps));
  for (int64_t n = 0; n < c; ++n) {
    cpu::k_unpack_row()(source.packed + n * source.row_stride, taps, h.bits, codes.data());
    for (int64_t s = 0; s < h.segments; ++s) {
      array(h.scale)[s * c + n] = source.scale[source.first_scale(n) + s];
      integers(h.zero_point)[s * c + n] = source.zero_point[source.first_scale(n) + s];
    }
    for (int64_t t = 0; t < taps; ++t) {
      blob[h.codes + t * c + n] = codes[t];
      if (int8)
        blob[h.a + t * c + n] = static_cast<uint8_t>(source.a_codes[n * taps + t] + 128);
      else if (h.rank > 0)
        array(h.a)[t * c + n] = source.a_float[n * taps + t];
    }
    if (h.has_bias) array(h.bias)[n] = source.bias[n];
    if (h.rank == 0) continue;
    array(h.b)[n] = int8 ? static_cast<float>(source.b_codes[n]) : source.b_float[n];
    array(h.a_scale)[n] = int8 ? source.a_scale[n] : 1.0f;
    integers(h.a_sum)[n] = int8 ? 128 : 0;
  }
}

template <typename X>
void run_depthwise(const Layer& layer, const Window& win, const LayerInput<X>& in, const LayerOutput& output) {
  constexpr bool kInt = std::is_same_v<X, uint8_t>;
  const LayerHeader& h = *layer.h;
  const int64_t taps = h.taps, c = h.channels, room = round_up(c, cpu::kLanes);
  const bool rank = h.rank > 0, a_int = h.adapter == AdapterKind::kInt8;
  const float* b = rank ? layer.at<float>(h.b) : nullptr;
  const float* bias = h.has_bias ? layer.at<float>(h.bias) : nullptr;
  Buffer<float> filters(kInt ? 0 : taps * c), a_filters(rank && !(kInt && a_int) ? taps * c : 0);
  if (!kInt) dequantize_filters(layer, filters.get());
  if (rank && a_int && !kInt) {
    for (int64_t i = 0; i < taps * c; ++i)
      a_filters[i] = static_cast<float>(layer.at<uint8_t>(h.a)[i] - 128) * layer.at<float>(h.a_scale)[i % c];
  } else if (rank && !a_int) {
    std::copy_n(layer.at<float>(h.a), taps * c, a_filters.get());
  }
  std::vector<int64_t> offset;
  for (int64_t ky = 0; ky < h.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < h.kernel[1]; ++kx)
      offset.push_back(ky * h.dilation[0] * in.line + kx * h.dilation[1] * in.pixel);

  parallel_for(win.rows(), std::max<int64_t>(1, 16384 / (taps * c)), [&](int64_t begin, int64_t end) {
    std::vector<const X*> rows(static_cast<size_t>(taps));
    std::vector<const float*> real_rows(static_cast<size_t>(taps));
    Buffer<float> sums(room), hidden(rank ? c : 0), real(kInt && rank && !a_int ? taps * c : 0);
    for (int64_t m = begin; m < end; ++m) {
      const int64_t image = m / win.pixels(), y = m % win.pixels() / win.out(1), x = m % win.out(1);
      const X* base = in.x + image * in.image + y * h.stride[0] * in.line + x * h.stride[1] * in.pixel;
      for (int64_t t = 0; t < taps; ++t) rows[t] = base + offset[t];
      float sx = 1.0f;
      if constexpr (kInt) {
        const int32_t zx = in.zero[image];
        sx = in.scale[image];
        std::fill_n(sums.get(), c, 0.0f);
        integer_sums(layer, rows.data(), zx, sums.get());
        if (rank && a_int) {
          std::fill_n(hidden.get(), c, 0.0f);
          cpu::k_depthwise_s8()(rows.data(), zx, layer.at<uint8_t>(h.a), layer.at<int32_t>(h.a_sum),
                                layer.at<float>(h.a_scale), taps, c, hidden.get());
        } else if (rank) {
          for (int64_t t = 0; t < taps; ++t) {
            for (int64_t n = 0; n < c; ++n) real[t * c + n] = static_cast<float>(rows[t][n] - zx);
            real_rows[t] = &real[t * c];
          }
          cpu::k_depthwise_f32()(real_rows.data(), a_filters.get(), taps, c, hidden.get());
        }
        if (rank) cpu::k_depthwise_finish()(hidden.get(), sx, nullptr, nullptr, nullptr, c);
      } else {
        cpu::k_depthwise_f32()(rows.data(), filters.get(), taps, c, sums.get());
        if (rank) cpu::k_depthwise_f32()(rows.data(), a_filters.get(), taps, c, hidden.get());
      }
      cpu::k_depthwise_finish()(sums.get(), sx, rank ? hidden.get() : nullptr, b, bias, c);
      const int64_t at = image * output.image + y * output.line + x * output.pixel;
      const int64_t add_at = image * output.add_image + y * output.add_line + x * output.add_pixel;
      for (int64_t n = 0; n < c; n += cpu::kLanes) {
        cpu::Epilogue e = output.epilogue;
        e.c = sums.get() + n;
        const int64_t to = at + n, from = add_at + n;
        cpu::k_epilogue()(e, 1, static_cast<int>(std::min<int64_t>(cpu::kLanes, c - n)), &to, &from);
      }
    }
  });
}

template void run_depthwise(const Layer&, const Window&, const LayerInput<float>&, const LayerOutput&);
template void run_depthwise(const Layer&, const Window&, const LayerInput<uint8_t>&, const LayerOutput&);

}  // namespace cora
