// Depthwise kernels, AVX2 + FMA.
// Method: up to 6 output positions by 16 channels lie in 12 accumulators, the filter is walked outside.
// Codes: the strip is [pixel][pair of rows][32][2] 16-bit, so vpmaddwd takes two rows of the filter at once,
// exactly for every weight.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AVX2

namespace cora::cpu::avx2 {

namespace {

constexpr int kPositions = 6;
constexpr int64_t kPairRow = 2 * kLanes;  // 16-bit values

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

/// The first `count` of eight lanes.
inline __m256i lane_mask(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

template <int kP, bool kTail>
void floats(const float* x, const DepthwiseShape& s, const float* w, int64_t w_row, int lanes, float* c) {
  const __m256i masks[2] = {lane_mask(lanes), lane_mask(lanes - 8)};
  const int64_t step = s.stride * s.pixel, column = s.dilation * s.pixel;
  __m256 sum[kP][2];
  for (auto& row : sum) row[0] = row[1] = _mm256_setzero_ps();
  for (int64_t ky = 0; ky < s.rows; ++ky, x += s.line, w += w_row) {
    const float *from = x, *weights = w;
    for (int64_t kx = 0; kx < s.columns; ++kx, from += column, weights += kLanes) {
      const __m256 wh[2] = {_mm256_loadu_ps(weights), _mm256_loadu_ps(weights + 8)};
      const float* at = from;
#pragma GCC unroll 6
      for (int i = 0; i < kP; ++i, at += step)
        for (int h = 0; h < 2; ++h) {
          const __m256 v = kTail ? _mm256_maskload_ps(at + 8 * h, masks[h]) : _mm256_loadu_ps(at + 8 * h);
          sum[i][h] = _mm256_fmadd_ps(v, wh[h], sum[i][h]);
        }
    }
  }
  for (int i = 0; i < kP; ++i)
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(c + i * kLanes + 8 * h, sum[i][h]);
}

/// Bytes 0 and 1 of each dword (or 2 and 3) as 16-bit values.
template <int kPair>
inline __m256i widen(__m256i w) {
  const __m256i high = _mm256_set1_epi32(kPair == 0 ? static_cast<int>(0x01800080u) : static_cast<int>(0x03800280u));
  const __m256i base = _mm256_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00, 0, 0x04000400, 0x08000800, 0x0c000c00);
  return _mm256_srai_epi16(_mm256_shuffle_epi8(w, _mm256_add_epi8(high, base)), 8);
}

template <int kP>
void codes(const uint16_t* strip, const DepthwiseShape& s, const int8_t* w, int64_t planes, int32_t* acc) {
  const int64_t pairs = (s.rows + 1) / 2, pixel = pairs * kPairRow, step = s.stride * pixel;
  __m256i sum[kP][2];
  for (auto& row : sum) row[0] = row[1] = _mm256_setzero_si256();
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t kx = 0; kx < s.columns; ++kx, w += s.quads() * kQuadRow)
      for (int64_t pair = 0; pair < pairs; ++pair) {
        __m256i wh[2];
        for (int h = 0; h < 2; ++h) {
          const __m256i quad = load(w + pair / 2 * kQuadRow + 32 * h);
          wh[h] = pair % 2 == 0 ? widen<0>(quad) : widen<1>(quad);
        }
        const uint16_t* at = strip + kx * s.dilation * pixel + pair * kPairRow;
#pragma GCC unroll 6
        for (int i = 0; i < kP; ++i, at += step)
          for (int h = 0; h < 2; ++h)
            sum[i][h] = _mm256_add_epi32(sum[i][h], _mm256_madd_epi16(load(at + 16 * h), wh[h]));
      }
  for (int i = 0; i < kP; ++i)
    for (int h = 0; h < 2; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + i * kLanes + 8 * h), sum[i][h]);
}

/// 16 channels of which `lanes` exist.
inline __m128i load_bytes(const uint8_t* x, int lanes) {
  if (lanes >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  uint8_t bytes[16] = {};
  std::memcpy(bytes, x, static_cast<size_t>(lanes));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

#define CORA_POSITIONS(f) {f(1), f(2), f(3), f(4), f(5), f(6)}

}  // namespace

void depthwise_f32(const float* x, const DepthwiseShape& s, const float* w, int64_t w_row, int64_t count, int lanes,
                   float* c) {
#define CORA_WHOLE(p) floats<p, false>
#define CORA_TAIL(p) floats<p, true>
  static constexpr decltype(&floats<1, true>) kTiles[2][kPositions] = {CORA_POSITIONS(CORA_WHOLE),
                                                                       CORA_POSITIONS(CORA_TAIL)};
  for (int n = 0; n < lanes; n += 16)
    for (int64_t i = 0; i < count; i += kPositions) {
      const int64_t positions = count - i < kPositions ? count - i : kPositions;
      kTiles[lanes - n < 16][positions - 1](x + i * s.stride * s.pixel + n, s, w + n, w_row, lanes - n,
                                            c + i * kLanes + n);
    }
}

void depthwise_strip(const uint8_t* x, const DepthwiseShape& s, int64_t width, int lanes, uint8_t* strip) {
  uint16_t* to = reinterpret_cast<uint16_t*>(strip);
  for (int64_t i = 0; i < width; ++i, x += s.pixel)
    for (int64_t row = 0; row < s.rows; row += 2, to += kPairRow)
      for (int n = 0; n < lanes; n += 16) {
        const uint8_t* from = x + row * s.line + n;
        const __m128i first = load_bytes(from, lanes - n);
        const __m128i second = row + 1 < s.rows ? load_bytes(from + s.line, lanes - n) : _mm_setzero_si128();
        __m256i* out = reinterpret_cast<__m256i*>(to + 2 * n);
        _mm256_storeu_si256(out, _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(first, second)));
        _mm256_storeu_si256(out + 1, _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(first, second)));
      }
}

void depthwise_s8(const uint8_t* strip, const DepthwiseShape& s, const int8_t* w, int64_t planes, int64_t count,
                  int lanes, int32_t* acc) {
#define CORA_CODES(p) codes<p>
  static constexpr decltype(&codes<1>) kTiles[kPositions] = CORA_POSITIONS(CORA_CODES);
  const int64_t step = s.stride * ((s.rows + 1) / 2) * kPairRow;
  for (int n = 0; n < lanes; n += 16)
    for (int64_t i = 0; i < count; i += kPositions) {
      const int64_t positions = count - i < kPositions ? count - i : kPositions;
      kTiles[positions - 1](reinterpret_cast<const uint16_t*>(strip) + i * step + 2 * n, s, w + n * kQuad, planes,
                            acc + i * kLanes + n);
    }
}

}  // namespace cora::cpu::avx2

CORA_END_TARGET
#endif
