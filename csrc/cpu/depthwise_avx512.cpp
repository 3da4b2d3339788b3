// Depthwise kernels, AVX-512 with VNNI and VBMI.
// Method: up to 14 output positions by 32 channels lie in 28 accumulators; the filter is walked outside,
// so each weight vector is loaded once for all of them. Codes: the strip is [pixel][quad of rows][32][4],
// made by three inserts and one byte permute a 16 channels, so vpdpbusd takes four rows of the filter at
// once and a pixel's vectors serve every column of the filter that meets it.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

CORA_BEGIN_AVX512

namespace cora::cpu::avx512 {

namespace {

// 7, 14, 28, 56 and 112 are the widths of most networks' maps.
constexpr int kPositions = 14;

inline __mmask16 mask16(int left) {
  return left >= 16 ? static_cast<__mmask16>(0xffff) : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

/// The next position: one running pointer, where the compiler would keep fourteen and spill them.
template <typename T>
inline void advance(const T*& at, int64_t step) {
  at += step;
  asm("" : "+r"(at));
}
/// Keeps a sum in its register up to here: GCC would copy it to memory in every turn of the loop before.
inline void settle(__m512i& sum) { asm("" : "+v"(sum)); }

template <bool kTail>
inline __m512 load_floats(__mmask16 mask, const float* x) {
  return kTail ? _mm512_maskz_loadu_ps(mask, x) : _mm512_loadu_ps(x);
}
template <bool kTail>
inline __m128i load_bytes(__mmask16 mask, const uint8_t* x) {
  return kTail ? _mm_maskz_loadu_epi8(mask, x) : _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
}

/// kHalves vectors of 16 channels by kP positions.
template <int kP, int kHalves, bool kTail>
void floats(const float* x, const DepthwiseShape& s, const float* w, int64_t w_row, int lanes, float* c) {
  const __mmask16 masks[2] = {mask16(lanes), mask16(lanes - 16)};
  const int64_t step = s.stride * s.pixel, column = s.dilation * s.pixel;
  __m512 sum[kP][kHalves];
#pragma GCC unroll 14
  for (int i = 0; i < kP; ++i)
    for (int h = 0; h < kHalves; ++h) sum[i][h] = _mm512_setzero_ps();
  for (int64_t ky = 0; ky < s.rows; ++ky, x += s.line, w += w_row) {
    const float *from = x, *weights = w;
    for (int64_t kx = 0; kx < s.columns; ++kx, from += column, weights += kLanes) {
      __m512 wh[kHalves];
      for (int h = 0; h < kHalves; ++h) wh[h] = _mm512_loadu_ps(weights + 16 * h);
      const float* at = from;
#pragma GCC unroll 14
      for (int i = 0; i < kP; ++i, advance(at, step))
        for (int h = 0; h < kHalves; ++h)
          sum[i][h] = _mm512_fmadd_ps(load_floats<kTail>(masks[h], at + 16 * h), wh[h], sum[i][h]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kP; ++i)
    for (int h = 0; h < kHalves; ++h) _mm512_storeu_ps(c + i * kLanes + 16 * h, sum[i][h]);
}

template <int kP, int kHalves>
void codes(const uint8_t* strip, const DepthwiseShape& s, const int8_t* w, int64_t planes, int32_t* acc) {
  const int64_t pixel = s.quads() * kQuadRow, step = s.stride * pixel, column = s.dilation * pixel;
  __m512i sum[kP][kHalves];
#pragma GCC unroll 14
  for (int i = 0; i < kP; ++i)
    for (int h = 0; h < kHalves; ++h) sum[i][h] = _mm512_setzero_si512();
  for (int64_t plane = 0; plane < planes; ++plane) {
    const uint8_t* from = strip;
    for (int64_t kx = 0; kx < s.columns; ++kx, from += column)
      for (int64_t quad = 0; quad < pixel; quad += kQuadRow, w += kQuadRow) {
        __m512i wh[kHalves];
        for (int h = 0; h < kHalves; ++h) wh[h] = _mm512_loadu_si512(w + 64 * h);
        const uint8_t* at = from + quad;
#pragma GCC unroll 14
        for (int i = 0; i < kP; ++i, advance(at, step))
          for (int h = 0; h < kHalves; ++h)
            sum[i][h] = _mm512_dpbusd_epi32(sum[i][h], _mm512_loadu_si512(at + 64 * h), wh[h]);
      }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kP; ++i)
    for (int h = 0; h < kHalves; ++h) _mm512_storeu_si512(acc + i * kLanes + 16 * h, sum[i][h]);
}

/// 32 channels' values of one position as 16-bit words, lanes in packs order.
template <int kHalves>
inline __m512i words_of(const __m512 v[2], __m512 inverse, __m512 high, __m512i zero) {
  __m512i word[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  // min returns its second operand for a NaN, which then converts to the smallest integer, as does what is
  // below the integers; only what is above them needs the bound here.
  for (int h = 0; h < kHalves; ++h) word[h] = _mm512_cvtps_epi32(_mm512_min_ps(high, _mm512_mul_ps(v[h], inverse)));
  return _mm512_adds_epi16(_mm512_packs_epi32(word[0], word[1]), zero);
}

template <int kP, int kHalves, bool kAdapter>
void codes_to_codes(const uint8_t* strip, const DepthwiseShape& s, const DepthwiseFilter& f, const Epilogue& e,
                    int lanes, int64_t y_pixel, uint8_t* y) {
  const int64_t pixel = s.quads() * kQuadRow, step = s.stride * pixel, column = s.dilation * pixel;
  __m512i sum[kP][kHalves], a_sum[kP][kHalves];
#pragma GCC unroll 14
  for (int i = 0; i < kP; ++i)
    for (int h = 0; h < kHalves; ++h) {
      sum[i][h] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(f.correction + 16 * h));
      if (kAdapter) a_sum[i][h] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(f.a_correction + 16 * h));
    }
  const int8_t *w = f.w, *a = f.a;
  for (int64_t plane = 0; plane < f.planes; ++plane) {
    const uint8_t* from = strip;
    for (int64_t kx = 0; kx < s.columns; ++kx, from += column)
      for (int64_t quad = 0; quad < pixel; quad += kQuadRow, w += kQuadRow, a += kAdapter ? kQuadRow : 0)
        for (int h = 0; h < kHalves; ++h) {
          const __m512i wh = _mm512_loadu_si512(w + 64 * h);
          const __m512i ah = kAdapter && plane == 0 ? _mm512_loadu_si512(a + 64 * h) : _mm512_setzero_si512();
          const uint8_t* at = from + quad + 64 * h;
#pragma GCC unroll 14
          for (int i = 0; i < kP; ++i, advance(at, step)) {
            const __m512i x = _mm512_loadu_si512(at);
            sum[i][h] = _mm512_dpbusd_epi32(sum[i][h], x, wh);
            if (kAdapter) a_sum[i][h] = _mm512_dpbusd_epi32(a_sum[i][h], x, ah);
          }
        }
  }

#pragma GCC unroll 14
  for (int i = 0; i < kP; ++i)
    for (int h = 0; h < kHalves; ++h) {
      settle(sum[i][h]);
      if (kAdapter) settle(a_sum[i][h]);
    }

  const __m512 inverse = _mm512_set1_ps(e.inverse_scale), high = _mm512_set1_ps(e.code_high);
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(e.zero_point));
  // Rounding keeps order: it and clamping may change places.
  const __m512i low = _mm512_set1_epi8(static_cast<char>(e.least_code));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __mmask32 mask = static_cast<__mmask32>(mask16(lanes - 16)) << 16 | mask16(lanes);
  __m512 alpha[2], bias[2], beta[2];
  for (int h = 0; h < kHalves; ++h) {
    alpha[h] = _mm512_loadu_ps(f.alpha + 16 * h);
    bias[h] = e.bias != nullptr ? _mm512_loadu_ps(e.bias + 16 * h) : _mm512_setzero_ps();
    if (kAdapter) beta[h] = _mm512_loadu_ps(f.beta + 16 * h);
  }
#pragma GCC unroll 7
  for (int i = 0; i < kP; i += 2) {
    __m512i words[2];
    for (int r = 0; r < 2; ++r) {
      const int k = i + r < kP ? i + r : i;
      __m512 v[2];
      for (int h = 0; h < kHalves; ++h) {
        v[h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[k][h]), alpha[h], bias[h]);
        if (kAdapter) v[h] = _mm512_add_ps(v[h], _mm512_mul_ps(_mm512_cvtepi32_ps(a_sum[k][h]), beta[h]));
      }
      words[r] = words_of<kHalves>(v, inverse, high, zero);
    }
    const __m512i packed = _mm512_max_epu8(_mm512_packus_epi16(words[0], words[1]), low);
    const __m512i codes = _mm512_permutexvar_epi32(order, packed);
    _mm256_mask_storeu_epi8(y + i * y_pixel, mask, _mm512_castsi512_si256(codes));
    if (i + 1 < kP) _mm256_mask_storeu_epi8(y + (i + 1) * y_pixel, mask, _mm512_extracti64x4_epi64(codes, 1));
  }
}

/// The vectors of one quad of rows, of which kRows exist, for all pixels.
template <int kRows, bool kTail>
void strip_quad(const uint8_t* x, int64_t line, int64_t pixel, int64_t width, int lanes, uint8_t* strip, int64_t next) {
  const __m512i order =
      _mm512_set_epi8(63, 47, 31, 15, 62, 46, 30, 14, 61, 45, 29, 13, 60, 44, 28, 12, 59, 43, 27, 11, 58, 42, 26, 10,
                      57, 41, 25, 9, 56, 40, 24, 8, 55, 39, 23, 7, 54, 38, 22, 6, 53, 37, 21, 5, 52, 36, 20, 4, 51, 35,
                      19, 3, 50, 34, 18, 2, 49, 33, 17, 1, 48, 32, 16, 0);
  for (int h = 0; h < 2 && 16 * h < lanes; ++h) {
    const __mmask16 mask = mask16(lanes - 16 * h);
    const uint8_t* from = x + 16 * h;
    uint8_t* to = strip + 64 * h;
    for (int64_t i = 0; i < width; ++i, from += pixel, to += next) {
      __m512i v = _mm512_zextsi128_si512(load_bytes<kTail>(mask, from));
      if (kRows > 1) v = _mm512_inserti32x4(v, load_bytes<kTail>(mask, from + line), 1);
      if (kRows > 2) v = _mm512_inserti32x4(v, load_bytes<kTail>(mask, from + 2 * line), 2);
      if (kRows > 3) v = _mm512_inserti32x4(v, load_bytes<kTail>(mask, from + 3 * line), 3);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi8(order, v));
    }
  }
}

/// Calls tile(position, positions) with even shares of count, at most kMost each.
template <int kMost = kPositions, typename Tile>
inline void share(int64_t count, const Tile& tile) {
  const int64_t tiles = (count + kMost - 1) / kMost;
  for (int64_t t = 0, i = 0; t < tiles; ++t) {
    const int64_t next = count * (t + 1) / tiles;
    tile(i, next - i);
    i = next;
  }
}

#define CORA_HALF_POSITIONS(f, ...)                                            \
  {f<1, __VA_ARGS__>, f<2, __VA_ARGS__>, f<3, __VA_ARGS__>, f<4, __VA_ARGS__>, \
   f<5, __VA_ARGS__>, f<6, __VA_ARGS__>, f<7, __VA_ARGS__>}
#define CORA_POSITIONS(f, ...)                                                                        \
  {f<1, __VA_ARGS__>,  f<2, __VA_ARGS__>,  f<3, __VA_ARGS__>,  f<4, __VA_ARGS__>, f<5, __VA_ARGS__>,  \
   f<6, __VA_ARGS__>,  f<7, __VA_ARGS__>,  f<8, __VA_ARGS__>,  f<9, __VA_ARGS__>, f<10, __VA_ARGS__>, \
   f<11, __VA_ARGS__>, f<12, __VA_ARGS__>, f<13, __VA_ARGS__>, f<14, __VA_ARGS__>}

}  // namespace

void depthwise_f32(const float* x, const DepthwiseShape& s, const float* w, int64_t w_row, int64_t count, int lanes,
                   float* c) {
  static constexpr decltype(&floats<1, 1, true>) kTiles[3][kPositions] = {
      CORA_POSITIONS(floats, 1, true), CORA_POSITIONS(floats, 2, true), CORA_POSITIONS(floats, 2, false)};
  const auto& tiles = kTiles[lanes <= 16 ? 0 : lanes < kLanes ? 1 : 2];
  share(count, [&](int64_t i, int64_t positions) {
    tiles[positions - 1](x + i * s.stride * s.pixel, s, w, w_row, lanes, c + i * kLanes);
  });
}

void depthwise_strip(const uint8_t* x, const DepthwiseShape& s, int64_t width, int lanes, uint8_t* strip) {
  static constexpr decltype(&strip_quad<1, true>) kRows[2][kQuad] = {
      {strip_quad<1, false>, strip_quad<2, false>, strip_quad<3, false>, strip_quad<4, false>},
      {strip_quad<1, true>, strip_quad<2, true>, strip_quad<3, true>, strip_quad<4, true>}};
  for (int64_t row = 0; row < s.rows; row += kQuad) {
    const int64_t rows = s.rows - row < kQuad ? s.rows - row : kQuad;
    kRows[lanes % 16 != 0][rows - 1](x + row * s.line, s.line, s.pixel, width, lanes, strip + row / kQuad * kQuadRow,
                                     s.quads() * kQuadRow);
  }
}

void depthwise_s8(const uint8_t* strip, const DepthwiseShape& s, const int8_t* w, int64_t planes, int64_t count,
                  int lanes, int32_t* acc) {
  static constexpr decltype(&codes<1, 1>) kTiles[2][kPositions] = {CORA_POSITIONS(codes, 1), CORA_POSITIONS(codes, 2)};
  const auto& tiles = kTiles[lanes > 16];
  share(count, [&](int64_t i, int64_t positions) {
    tiles[positions - 1](strip + i * s.stride * s.quads() * kQuadRow, s, w, planes, acc + i * kLanes);
  });
}

void depthwise_codes(const uint8_t* strip, const DepthwiseShape& s, const DepthwiseFilter& f, const Epilogue& e,
                     int64_t count, int lanes, int64_t y_pixel) {
  static constexpr decltype(&codes_to_codes<1, 1, false>) kTiles[2][kPositions] = {
      CORA_POSITIONS(codes_to_codes, 1, false), CORA_POSITIONS(codes_to_codes, 2, false)};
  static constexpr decltype(&codes_to_codes<1, 1, true>) kAdapterTiles[2][kPositions / 2] = {
      CORA_HALF_POSITIONS(codes_to_codes, 1, true), CORA_HALF_POSITIONS(codes_to_codes, 2, true)};
  const auto run = [&](const auto& tiles) {
    return [&](int64_t i, int64_t positions) {
      tiles[positions - 1](strip + i * s.stride * s.quads() * kQuadRow, s, f, e, lanes, y_pixel,
                           static_cast<uint8_t*>(e.y) + i * y_pixel);
    };
  };
  if (f.a == nullptr)
    share(count, run(kTiles[lanes > 16]));
  else
    share<kPositions / 2>(count, run(kAdapterTiles[lanes > 16]));
}

}  // namespace cora::cpu::avx512

CORA_END_TARGET
#endif
