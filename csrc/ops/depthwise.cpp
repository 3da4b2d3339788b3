// Depthwise layers: each channel its own filter. Channels lie together in memory, so the vector runs
// over channels and nothing is unpacked into tiles: weights become [taps][channels] once a call.
// The adapter has rank 0 or 1, all a group of one row can use.
#include "ops/layer.h"

#include <type_traits>

namespace cora {

template <typename T>
void run_depthwise(const LayerWeights& w, const Window& win, const LayerInput<T>& in, float* y) {
  constexpr bool kInt = std::is_same_v<T, int8_t>;
  const int64_t taps = win.taps(), c = win.channels, groups = w.q.groups, group_taps = w.q.group_size;
  using Weight = std::conditional_t<kInt, uint8_t, float>;
  Buffer<Weight> weight(taps * c);
  Buffer<float> scale(groups * c), a(w.rank > 0 ? taps * c : 0), b(w.rank > 0 ? c : 0);
  Buffer<int32_t> zero(groups * c);
  std::vector<uint8_t> codes(static_cast<size_t>(taps));
  for (int64_t n = 0; n < c; ++n) {
    cpu::k_unpack_row()(w.packed + n * w.row_stride, taps, w.bits, codes.data());
    for (int64_t s = 0; s < groups; ++s) {
      scale[s * c + n] = w.scale[w.first_scale(n) + s];
      zero[s * c + n] = w.zero_point[w.first_scale(n) + s];
    }
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t s = t / group_taps;
      if constexpr (kInt)
        weight[t * c + n] = codes[t];
      else
        weight[t * c + n] = scale[s * c + n] * static_cast<float>(codes[t] - zero[s * c + n]);
    }
    for (int64_t t = 0; w.rank > 0 && t < taps; ++t) {
      const int64_t at = n * taps + t;
      a[t * c + n] = w.a_codes ? static_cast<float>(w.a_codes[at]) * (kInt ? 1.0f : w.a_scale[n]) : w.a_float[at];
    }
    if (w.rank > 0) b[n] = w.b[n];
  }
  const bool narrow = !kInt || fits_int32(w, group_taps);

  std::vector<int64_t> offset;
  for (int64_t ky = 0; ky < win.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < win.kernel[1]; ++kx)
      offset.push_back(ky * win.dilation[0] * in.line + kx * win.dilation[1] * in.pixel);

  parallel_for(win.rows(), std::max<int64_t>(1, 16384 / (taps * c)), [&](int64_t begin, int64_t end) {
    std::vector<const T*> rows(static_cast<size_t>(taps));
    std::vector<const float*> float_rows(static_cast<size_t>(taps));
    Buffer<float> hidden(w.rank > 0 ? c : 0), real(kInt && w.rank > 0 ? taps * c : 0);
    for (int64_t m = begin; m < end; ++m) {
      const T* base = in.x + in.offset(win, m);
      for (int64_t t = 0; t < taps; ++t) rows[t] = base + offset[t];
      float* out = y + m * c;
      float sx = 1.0f;
      if constexpr (kInt) {
        const int64_t image = m / win.pixels();
        const int32_t zx = in.zero[image];
        sx = in.scale[image];
        std::fill_n(out, c, 0.0f);
        for (int64_t s = 0; s < groups; ++s) {
          const int8_t* const* part = rows.data() + s * group_taps;
          if (narrow) {
            cpu::k_depthwise_s8()(part, zx, &weight[s * group_taps * c], &zero[s * c], &scale[s * c], group_taps, c, out);
            continue;
          }
          for (int64_t n = 0; n < c; ++n) {  // far zero-points: the same in 64 bits
            int64_t sum = 0;
            for (int64_t t = 0; t < group_taps; ++t)
              sum += int64_t{part[t][n] - zx} * (weight[(s * group_taps + t) * c + n] - zero[s * c + n]);
            out[n] += static_cast<float>(sum) * scale[s * c + n];
          }
        }
        if (w.rank > 0) {
          for (int64_t t = 0; t < taps; ++t) {
            for (int64_t n = 0; n < c; ++n) real[t * c + n] = static_cast<float>(rows[t][n] - zx);
            float_rows[t] = &real[t * c];
          }
          cpu::k_depthwise_f32()(float_rows.data(), a.get(), taps, c, hidden.get());
          // Small integers: the float sum of an int8 adapter is exact up to 516 taps.
          for (int64_t n = 0; n < c; ++n) hidden[n] = (w.a_codes ? hidden[n] * w.a_scale[n] : hidden[n]) * sx;
        }
      } else {
        cpu::k_depthwise_f32()(rows.data(), weight.get(), taps, c, out);
        if (w.rank > 0) cpu::k_depthwise_f32()(rows.data(), a.get(), taps, c, hidden.get());
      }
      cpu::k_depthwise_finish()(out, sx, w.rank > 0 ? hidden.get() : nullptr, b.get(), w.bias, c);
    }
  });
}

template void run_depthwise(const LayerWeights&, const Window&, const LayerInput<float>&, float*);
template void run_depthwise(const LayerWeights&, const Window&, const LayerInput<int8_t>&, float*);

}  // namespace cora
