// Depthwise layers: each channel its own filter. Channels lie together in memory, so the vector runs
// over channels and nothing is unpacked into tiles: weights become [taps][channels] once a call.
// The adapter has rank 0 or 1, all a group of one row can use.
#include "ops/layer.h"

#include <type_traits>

namespace cora {

namespace {

/// What the kernels read, channels contiguous: integer codes beside int8 input, else floats.
struct Filters {
  Buffer<uint8_t> codes, a_codes;   // [taps][channels]; a_codes is the adapter's code + 128
  Buffer<float> real, a_real;       // [taps][channels]
  Buffer<float> scale, a_scale, b;  // [scale groups][channels], [channels], [channels]
  Buffer<int32_t> zero, a_zero;
};

Filters load_filters(const LayerWeights& w, int64_t c, bool integer) {
  const int64_t taps = w.k, groups = w.q.groups;
  const bool rank = w.rank > 0, a_int = integer && w.a_codes != nullptr;
  Filters f;
  f.scale = Buffer<float>(groups * c);
  f.zero = Buffer<int32_t>(groups * c);
  f.codes = Buffer<uint8_t>(integer ? taps * c : 0);
  f.real = Buffer<float>(integer ? 0 : taps * c);
  if (rank) {
    f.b = Buffer<float>(c);
    std::copy_n(w.b, c, f.b.get());
    f.a_codes = Buffer<uint8_t>(a_int ? taps * c : 0);
    f.a_real = Buffer<float>(a_int ? 0 : taps * c);
  }
  if (a_int) {
    f.a_scale = Buffer<float>(c);
    f.a_zero = Buffer<int32_t>(c);
    std::copy_n(w.a_scale, c, f.a_scale.get());
    std::fill_n(f.a_zero.get(), c, 128);
  }
  std::vector<uint8_t> codes(static_cast<size_t>(taps));
  for (int64_t n = 0; n < c; ++n) {
    cpu::k_unpack_row()(w.packed + n * w.row_stride, taps, w.bits, codes.data());
    for (int64_t s = 0; s < groups; ++s) {
      f.scale[s * c + n] = w.scale[w.first_scale(n) + s];
      f.zero[s * c + n] = w.zero_point[w.first_scale(n) + s];
    }
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t to = t * c + n, s = t / w.q.group_size * c + n, at = n * taps + t;
      if (integer)
        f.codes[to] = codes[t];
      else
        f.real[to] = f.scale[s] * static_cast<float>(codes[t] - f.zero[s]);
      if (a_int)
        f.a_codes[to] = static_cast<uint8_t>(w.a_codes[at] + 128);
      else if (rank)
        f.a_real[to] = w.a_codes ? static_cast<float>(w.a_codes[at]) * w.a_scale[n] : w.a_float[at];
    }
  }
  return f;
}

/// out[c] += the exact integer sums of one position, scale group by scale group.
void integer_sums(const LayerWeights& w, const Filters& f, const int8_t* const* rows, int32_t zx, int64_t c,
                  bool narrow, float* out) {
  const int64_t taps = w.q.group_size;
  for (int64_t s = 0; s < w.q.groups; ++s, rows += taps) {
    const uint8_t* codes = &f.codes[s * taps * c];
    const float* scale = &f.scale[s * c];
    const int32_t* zero = &f.zero[s * c];
    if (narrow) {
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

}  // namespace

template <typename T>
void run_depthwise(const LayerWeights& w, const Window& win, const LayerInput<T>& in, float* y) {
  constexpr bool kInt = std::is_same_v<T, int8_t>;
  const int64_t taps = w.k, c = win.channels;
  const bool rank = w.rank > 0, a_int = kInt && w.a_codes != nullptr;
  [[maybe_unused]] const bool narrow = !kInt || fits_int32(w, w.q.group_size);
  const Filters f = load_filters(w, c, kInt);
  std::vector<int64_t> offset;
  for (int64_t ky = 0; ky < win.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < win.kernel[1]; ++kx)
      offset.push_back(ky * win.dilation[0] * in.line + kx * win.dilation[1] * in.pixel);

  parallel_for(win.rows(), std::max<int64_t>(1, 16384 / (taps * c)), [&](int64_t begin, int64_t end) {
    std::vector<const T*> rows(static_cast<size_t>(taps));
    std::vector<const float*> real_rows(static_cast<size_t>(taps));
    Buffer<float> hidden(rank ? c : 0), real(kInt && rank && !a_int ? taps * c : 0);
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
        integer_sums(w, f, rows.data(), zx, c, narrow, out);
        if (a_int) {
          std::fill_n(hidden.get(), c, 0.0f);
          cpu::k_depthwise_s8()(rows.data(), zx, f.a_codes.get(), f.a_zero.get(), f.a_scale.get(), taps, c,
                                hidden.get());
        } else if (rank) {
          for (int64_t t = 0; t < taps; ++t) {
            for (int64_t n = 0; n < c; ++n) real[t * c + n] = static_cast<float>(rows[t][n] - zx);
            real_rows[t] = &real[t * c];
          }
          cpu::k_depthwise_f32()(real_rows.data(), f.a_real.get(), taps, c, hidden.get());
        }
        if (rank) cpu::k_depthwise_finish()(hidden.get(), sx, nullptr, nullptr, nullptr, c);
      } else {
        cpu::k_depthwise_f32()(rows.data(), f.real.get(), taps, c, out);
        if (rank) cpu::k_depthwise_f32()(rows.data(), f.a_real.get(), taps, c, hidden.get());
      }
      cpu::k_depthwise_finish()(out, sx, rank ? hidden.get() : nullptr, f.b.get(), w.bias, c);
    }
  });
}

template void run_depthwise(const LayerWeights&, const Window&, const LayerInput<float>&, float*);
template void run_depthwise(const LayerWeights&, const Window&, const LayerInput<int8_t>&, float*);

}  // namespace cora
