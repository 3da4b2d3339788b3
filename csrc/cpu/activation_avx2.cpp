// Ranges and codes of activations, AVX2: 8 floats a step. The transposing kernel takes 8 pixels of 16 channels,
// puts four channels' codes into the bytes of a dword, and transposes dwords, so a store is one pixel's 16 bytes.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>

CORA_BEGIN_AVX2

namespace cora::cpu::avx2 {

namespace {

constexpr int kPixels = 8;
constexpr int kChannels = 16;

struct Quantizer {
  __m256 scale, zero_point, top;
  explicit Quantizer(RunParams p)
      : scale(_mm256_set1_ps(p.scale)), zero_point(_mm256_set1_ps(p.zero_point)), top(_mm256_set1_ps(p.max_code)) {}
  /// int32 lanes. max's second operand wins over a NaN: it becomes code 0.
  __m256i operator()(__m256 x) const {
    const __m256 rounded = _mm256_round_ps(_mm256_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 q = _mm256_add_ps(rounded, zero_point);
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(q, _mm256_setzero_ps()), top));
  }
};

/// Codes of `channels` <= 4 rows of x at one group of pixels: channel c is byte c of a pixel's dword.
inline __m256i dwords(const Quantizer& quantizer, const float* x, int64_t ldx, int channels, __m256i pixels) {
  __m256i v = _mm256_setzero_si256();
  for (int c = channels - 1; c >= 0; --c)
    v = _mm256_or_si256(_mm256_slli_epi32(v, 8), quantizer(_mm256_maskload_ps(x + c * ldx, pixels)));
  return v;
}

inline void store(__m128i v, int bytes, uint8_t* to) {
  if (bytes == kChannels) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
  uint8_t all[kChannels];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), v);
  std::memcpy(to, all, static_cast<size_t>(bytes));
}

}  // namespace

void range(const float* x, int64_t count, float* lo, float* hi) {
  __m256 low[4], high[4];
  for (int j = 0; j < 4; ++j) low[j] = high[j] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (int j = 0; j < 4; ++j) {
      const __m256 in = _mm256_loadu_ps(x + i + 8 * j);
      low[j] = _mm256_min_ps(in, low[j]);  // a NaN leaves the second operand, as the scalar comparison does
      high[j] = _mm256_max_ps(in, high[j]);
    }
  scalar::range(x + i, count - i, lo, hi);
  alignas(32) float lows[8], highs[8];
  _mm256_store_ps(lows, _mm256_min_ps(_mm256_min_ps(low[0], low[1]), _mm256_min_ps(low[2], low[3])));
  _mm256_store_ps(highs, _mm256_max_ps(_mm256_max_ps(high[0], high[1]), _mm256_max_ps(high[2], high[3])));
  for (int j = 0; j < 8; ++j) {
    *lo = lows[j] < *lo ? lows[j] : *lo;
    *hi = highs[j] > *hi ? highs[j] : *hi;
  }
}

void quantize_u8(const float* x, RunParams p, int64_t count, uint8_t* codes) {
  const Quantizer quantizer(p);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing interleaves 128-bit halves
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i a = quantizer(_mm256_loadu_ps(x + i)), b = quantizer(_mm256_loadu_ps(x + i + 8));
    const __m256i c = quantizer(_mm256_loadu_ps(x + i + 16)), d = quantizer(_mm256_loadu_ps(x + i + 24));
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permutevar8x32_epi32(bytes, in_order));
  }
  scalar::quantize_u8(x + i, p, count - i, codes + i);
}

void quantize_transpose(const float* x, int64_t ldx, int64_t rows, int64_t cols, RunParams p, uint8_t* out,
                        int64_t ldo) {
  const Quantizer quantizer(p);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t col = 0; col < cols; col += kPixels) {
    const int pixels = static_cast<int>(std::min<int64_t>(kPixels, cols - col));
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(pixels), lane);
    for (int64_t row = 0; row < rows; row += kChannels) {
      const int channels = static_cast<int>(std::min<int64_t>(kChannels, rows - row));
      const float* from = x + row * ldx + col;
      __m256i v[4];  // [4 channels][pixel]
      for (int j = 0; j < 4; ++j)
        v[j] = dwords(quantizer, from + 4 * j * ldx, ldx, std::clamp(channels - 4 * j, 0, 4), mask);
      const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
      const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
      const __m256i pixel[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                                _mm256_unpackhi_epi64(b, d)};  // pixel i, and i + 4 in the upper half
      uint8_t* to = out + col * ldo + row;
      for (int i = 0; i < std::min(pixels, 4); ++i) store(_mm256_castsi256_si128(pixel[i]), channels, to + i * ldo);
      for (int i = 4; i < pixels; ++i) store(_mm256_extracti128_si256(pixel[i - 4], 1), channels, to + i * ldo);
    }
  }
}

namespace {

/// kMove bytes at a time: what follows a pixel is written over by the next one.
template <int kMove>
void interleave_moves(const uint8_t* from, const int64_t* line, int64_t lines, int64_t bytes, int64_t count,
                      uint8_t* to) {
  for (int64_t x = 0; x < count; ++x, from += bytes)
    for (int64_t y = 0; y < lines; ++y, to += bytes) std::memcpy(to, from + line[y], kMove);
}

}  // namespace

void interleave(const uint8_t* from, const int64_t* line, int64_t lines, int64_t bytes, int64_t count, uint8_t* to) {
  (bytes <= 4   ? interleave_moves<4>
   : bytes <= 8 ? interleave_moves<8>
                : interleave_moves<16>)(from, line, lines, bytes, count, to);
}

namespace {

/// The largest of the 32 bytes at x, x + step, ...
inline __m256i largest(const uint8_t* x, int64_t taps, int64_t step) {
  __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  for (int64_t t = 1; t < taps; ++t)
    v = _mm256_max_epu8(v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t * step)));
  return v;
}

}  // namespace

void max_runs(const uint8_t* x, int64_t taps, int64_t step, int64_t run, int64_t count, int64_t ldx, int64_t ldy,
              uint8_t* y) {
  if (run < 32) return scalar::max_runs(x, taps, step, run, count, ldx, ldy, y);
  for (int64_t i = 0; i < count; ++i, x += ldx, y += ldy)
    for (int64_t n = 0; n < run; n += 32) {
      const int64_t at = std::min(n, run - 32);  // the last vector overlaps the one before
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + at), largest(x + at, taps, step));
    }
}

}  // namespace cora::cpu::avx2

CORA_END_TARGET
#endif
