// Ranges and codes of activations, AVX-512: 16 floats a step, masked tails. The transposing kernel takes 16 pixels
// of 16 channels, puts four channels' codes into the bytes of a dword, and transposes dwords, so a store is one
// pixel's 16 bytes; up to four channels (an image) need no transposition, only the removal of unused bytes.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>

CORA_BEGIN_AVX512

namespace cora::cpu::avx512 {

namespace {

constexpr int kPixels = 16;
constexpr int kChannels = 16;
constexpr int kAhead = 64;  // elements: more rows are read side by side than the hardware follows

inline __mmask16 low_bits(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

/// Codes as int32 lanes. A division takes twice the time of everything else, so codes come from a product with
/// 1 / scale first. Product and quotient differ by less than 2^-22 of their magnitude, which matters only where a
/// rounding or a limit lies between them: within that distance of a tie. There, found by the largest distance from an
/// integer in a block, the block is done again with the division, so that every code is that of the division.
struct Quantizer {
  __m512 scale, inverse, zero_point, top, low, high, limit;
  __m512i zero;

  explicit Quantizer(RunParams p)
      : scale(_mm512_set1_ps(p.scale)),
        inverse(_mm512_set1_ps(1.0f / p.scale)),
        zero_point(_mm512_set1_ps(p.zero_point)),
        top(_mm512_set1_ps(p.max_code)),
        low(_mm512_set1_ps(-p.zero_point)),
        high(_mm512_set1_ps(p.max_code - p.zero_point)),
        zero(_mm512_set1_epi32(static_cast<int>(p.zero_point))) {
    const float most = std::max(std::fabs(p.zero_point), std::fabs(p.max_code - p.zero_point));
    const bool normal = p.scale > 0x1p-100f && p.scale < 0x1p100f;  // 1 / scale has its full precision
    limit = _mm512_set1_ps(normal ? 0.5f - most * 0x1p-21f : -1.0f);
  }

  /// A NaN leaves the second operand of a maximum: it becomes code 0.
  __m512i exact(__m512 x) const {
    const __m512 rounded = _mm512_roundscale_ps(_mm512_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 q = _mm512_add_ps(rounded, zero_point);
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(q, _mm512_setzero_ps()), top));
  }
  __m512i near(__m512 x, __m512& distance) const {
    const __m512 v = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(x, inverse), low), high);
    const __m512i q = _mm512_cvtps_epi32(v);
    distance =
        _mm512_range_ps(distance, _mm512_sub_ps(v, _mm512_cvtepi32_ps(q)), 0xb);  // larger magnitude, as positive
    return _mm512_add_epi32(q, zero);
  }
  bool doubtful(__m512 distance) const { return _mm512_cmp_ps_mask(distance, limit, _CMP_GE_OQ) != 0; }
};

/// Codes of `channels` <= 4 rows of x at one group of pixels: channel c is byte c of a pixel's dword.
template <typename Code>
inline __m512i dwords(const Code& code, const float* x, int64_t ldx, int channels, __mmask16 pixels) {
  __m512i v = _mm512_setzero_si512();
  for (int c = channels - 1; c >= 0; --c) {
    const float* row = x + c * ldx;
    _mm_prefetch(reinterpret_cast<const char*>(row + kAhead), _MM_HINT_T0);
    v = _mm512_or_si512(_mm512_slli_epi32(v, 8), code(_mm512_maskz_loadu_ps(pixels, row)));
  }
  return v;
}

/// The same for up to 16 rows: v[j] holds rows 4 j .. 4 j + 3.
template <int kVectors>
inline void dwords(const Quantizer& quantizer, const float* x, int64_t ldx, int channels, __mmask16 pixels,
                   __m512i (&v)[kVectors]) {
  __m512 distance = _mm512_setzero_ps();
  const auto near = [&](__m512 in) { return quantizer.near(in, distance); };
  const auto exact = [&](__m512 in) { return quantizer.exact(in); };
  if (channels == kChannels)
    for (int j = 0; j < kVectors; ++j) v[j] = dwords(near, x + 4 * j * ldx, ldx, 4, pixels);
  else
    for (int j = 0; j < kVectors; ++j)
      v[j] = dwords(near, x + 4 * j * ldx, ldx, std::clamp(channels - 4 * j, 0, 4), pixels);
  if (quantizer.doubtful(distance))
    for (int j = 0; j < kVectors; ++j)
      v[j] = dwords(exact, x + 4 * j * ldx, ldx, std::clamp(channels - 4 * j, 0, 4), pixels);
}

/// Up to four channels at the pixel stride of their number (or 4): one store a group of pixels.
template <int kCount>
void quantize_image(const float* x, int64_t ldx, int64_t cols, const Quantizer& quantizer, uint8_t* out) {
  // Bytes 0..kCount - 1 of each dword to the front of its 128-bit quarter, then the quarters together.
  alignas(16) int8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(i < 4 * kCount ? i / kCount * 4 + i % kCount : -1);
  alignas(64) int32_t quarters[16];
  for (int i = 0; i < 16; ++i) quarters[i] = i < 4 * kCount ? i / kCount * 4 + i % kCount : 15;
  const __m512i squeeze = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i join = _mm512_load_si512(quarters);
  for (int64_t col = 0; col < cols; col += kPixels) {
    const int64_t pixels = std::min<int64_t>(kPixels, cols - col);
    __m512i v[1];
    dwords(quantizer, x + col, ldx, kCount, low_bits(pixels), v);
    if (kCount < 4) v[0] = _mm512_permutexvar_epi32(join, _mm512_shuffle_epi8(v[0], squeeze));
    const int64_t size = pixels * kCount;
    _mm512_mask_storeu_epi8(out + col * kCount, size == 64 ? ~0ull : (1ull << size) - 1, v[0]);
  }
}

}  // namespace

void range(const float* x, int64_t count, float* lo, float* hi) {
  // Two of each: a minimum takes four cycles. A NaN leaves the second operand, as the scalar comparison does.
  __m512 low0 = _mm512_setzero_ps(), low1 = low0, high0 = low0, high1 = low0;
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512 first = _mm512_loadu_ps(x + i), second = _mm512_loadu_ps(x + i + 16);
    low0 = _mm512_min_ps(first, low0);
    high0 = _mm512_max_ps(first, high0);
    low1 = _mm512_min_ps(second, low1);
    high1 = _mm512_max_ps(second, high1);
  }
  for (; i < count; i += 16) {
    const __m512 in = _mm512_maskz_loadu_ps(low_bits(count - i), x + i);
    low0 = _mm512_min_ps(in, low0);
    high0 = _mm512_max_ps(in, high0);
  }
  alignas(64) float lows[32], highs[32];
  _mm512_store_ps(lows, low0);
  _mm512_store_ps(lows + 16, low1);
  _mm512_store_ps(highs, high0);
  _mm512_store_ps(highs + 16, high1);
  *lo = lows[0];
  *hi = highs[0];
  for (int j = 1; j < 32; ++j) {
    *lo = lows[j] < *lo ? lows[j] : *lo;
    *hi = highs[j] > *hi ? highs[j] : *hi;
  }
}

void quantize_u8(const float* x, RunParams p, int64_t count, uint8_t* codes) {
  const Quantizer quantizer(p);
  const __m512i in_order =  // packing interleaves the four 128-bit quarters
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512i q[4];
    __m512 distance = _mm512_setzero_ps();
    for (int j = 0; j < 4; ++j) q[j] = quantizer.near(_mm512_loadu_ps(x + i + 16 * j), distance);
    if (quantizer.doubtful(distance))
      for (int j = 0; j < 4; ++j) q[j] = quantizer.exact(_mm512_loadu_ps(x + i + 16 * j));
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(in_order, bytes));
  }
  for (; i < count; i += 16) {
    const __mmask16 mask = low_bits(count - i);
    _mm512_mask_cvtepi32_storeu_epi8(codes + i, mask, quantizer.exact(_mm512_maskz_loadu_ps(mask, x + i)));
  }
}

void quantize_transpose(const float* x, int64_t ldx, int64_t rows, int64_t cols, RunParams p, uint8_t* out,
                        int64_t ldo) {
  const Quantizer quantizer(p);
  if (rows == ldo && rows == 1) return quantize_image<1>(x, ldx, cols, quantizer, out);
  if (rows == ldo && rows == 3) return quantize_image<3>(x, ldx, cols, quantizer, out);
  if (rows == ldo && rows == 4) return quantize_image<4>(x, ldx, cols, quantizer, out);
  for (int64_t col = 0; col < cols; col += kPixels) {
    const int pixels = static_cast<int>(std::min<int64_t>(kPixels, cols - col));
    const __mmask16 mask = low_bits(pixels);
    for (int64_t row = 0; row < rows; row += kChannels) {
      const int channels = static_cast<int>(std::min<int64_t>(kChannels, rows - row));
      const __mmask16 bytes = low_bits(channels);
      const float* from = x + row * ldx + col;
      __m512i v[4];  // [4 channels][pixel]
      dwords(quantizer, from, ldx, channels, mask, v);
      const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
      const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
      // Element i: pixels i, i + 4, i + 8, i + 12, one a 128-bit quarter.
      const __m512i pixel[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                                _mm512_unpackhi_epi64(b, d)};
      uint8_t* to = out + col * ldo + row;
      for (int i = 0; i < 4; ++i) {
        if (i < pixels) _mm_mask_storeu_epi8(to + i * ldo, bytes, _mm512_castsi512_si128(pixel[i]));
        if (i + 4 < pixels) _mm_mask_storeu_epi8(to + (i + 4) * ldo, bytes, _mm512_extracti32x4_epi32(pixel[i], 1));
        if (i + 8 < pixels) _mm_mask_storeu_epi8(to + (i + 8) * ldo, bytes, _mm512_extracti32x4_epi32(pixel[i], 2));
        if (i + 12 < pixels) _mm_mask_storeu_epi8(to + (i + 12) * ldo, bytes, _mm512_extracti32x4_epi32(pixel[i], 3));
      }
    }
  }
}

namespace {

constexpr int kGroup = 8, kMostPairs = 4, kMostBytes = 4;  // pixels of a line; pairs of lines; bytes of a pixel

/// Where the bytes of kGroup pixels of each line go: `from` and `mask` of each vector of the result and pair of lines,
/// which lie in a vector's halves.
struct Interleaving {
  int64_t lines = 0, bytes = 0;
  int pairs, vectors;
  alignas(64) uint8_t from[kMostPairs][kMostPairs][64];
  __mmask64 mask[kMostPairs][kMostPairs];

  static bool fits(int64_t lines, int64_t bytes) { return lines <= 2 * kMostPairs && bytes <= kMostBytes; }
  void fill(int64_t new_lines, int64_t new_bytes) {
    lines = new_lines;
    bytes = new_bytes;
    pairs = static_cast<int>((lines + 1) / 2);
    const int64_t all = kGroup * lines * bytes;
    vectors = static_cast<int>((all + 63) / 64);
    for (int v = 0; v < vectors; ++v)
      for (int p = 0; p < pairs; ++p) mask[v][p] = 0;
    for (int64_t i = 0; i < all; ++i) {
      const int64_t x = i / (lines * bytes), y = i / bytes % lines, j = i % bytes;
      from[i / 64][y / 2][i % 64] = static_cast<uint8_t>(y % 2 * 32 + x * bytes + j);
      mask[i / 64][y / 2] |= __mmask64{1} << i % 64;
    }
  }
};

}  // namespace

void interleave(const uint8_t* from, const int64_t* line, int64_t lines, int64_t bytes, int64_t count, uint8_t* to) {
  if (!Interleaving::fits(lines, bytes)) return avx2::interleave(from, line, lines, bytes, count, to);
  thread_local Interleaving of;  // of the thread's last layer
  if (of.lines != lines || of.bytes != bytes) of.fill(lines, bytes);
  const int pairs = of.pairs, vectors = of.vectors;
  for (int64_t x = 0; x < count; x += kGroup, from += kGroup * bytes, to += kGroup * lines * bytes) {
    __m512i x_of[kMostPairs];
    for (int p = 0; p < pairs; ++p) {
      const uint8_t *first = from + line[2 * p], *second = from + line[std::min<int64_t>(2 * p + 1, lines - 1)];
      x_of[p] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first))),
                                   _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
    }
    for (int v = 0; v < vectors; ++v) {
      __m512i out = _mm512_setzero_si512();
      for (int p = 0; p < pairs; ++p)
        out = _mm512_mask_permutexvar_epi8(out, of.mask[v][p], _mm512_load_si512(of.from[v][p]), x_of[p]);
      _mm512_storeu_si512(to + 64 * v, out);
    }
  }
}

void max_runs(const uint8_t* x, int64_t taps, int64_t step, int64_t run, int64_t count, int64_t ldx, int64_t ldy,
              uint8_t* y) {
  const auto largest = [&](const uint8_t* from, __mmask64 mask) __attribute__((always_inline)) {
    __m512i v = _mm512_maskz_loadu_epi8(mask, from);
    for (int64_t t = 1; t < taps; ++t) v = _mm512_max_epu8(v, _mm512_maskz_loadu_epi8(mask, from + t * step));
    return v;
  };
  const __mmask64 rest = run % 64 == 0 ? 0 : ~uint64_t{0} >> (64 - run % 64);
  for (int64_t i = 0; i < count; ++i, x += ldx, y += ldy) {
    int64_t n = 0;
    for (; n + 64 <= run; n += 64) _mm512_storeu_si512(y + n, largest(x + n, ~uint64_t{0}));
    if (rest != 0) _mm512_mask_storeu_epi8(y + n, rest, largest(x + n, rest));
  }
}

}  // namespace cora::cpu::avx512

CORA_END_TARGET
#endif
