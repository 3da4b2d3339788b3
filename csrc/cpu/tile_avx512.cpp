// The layer kernels, AVX-512 with VNNI.
// Method: a tile is 12 rows of x by 32 weight rows: 24 accumulators, two panel vectors and a broadcast
// operand, so each loaded panel vector feeds 12 FMAs (or vpdpbusd: unsigned weight codes times signed
// input, four of K a lane). Panels are built by dword gathers, 16 weight rows at a time.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AVX512

namespace cora::cpu::avx512 {

namespace {

inline __mmask16 mask16(int64_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xffff) : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}
inline __mmask64 mask64(int64_t left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

inline __m512i broadcast4(const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  return _mm512_set1_epi32(quad);
}

inline int32_t sum_epi32(__m512i v) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i pair = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
}

inline float sum_ps(__m512 v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

/// kHalves vectors of 16 weight rows by kM rows of x.
template <int kM, int kHalves>
void tile_s8_fixed(const int8_t* const* rows, int64_t taps, int64_t run, const uint8_t* panel, int32_t* acc) {
  __m512i c[kM][kHalves];
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < kHalves; ++h) c[i][h] = _mm512_loadu_si512(acc + i * kTileN + h * 16);
  for (int64_t t = 0; t < taps; ++t, rows += kTileM) {
    const int8_t* x[kM];
    for (int i = 0; i < kM; ++i) x[i] = rows[i];
#pragma GCC unroll 2
    for (int64_t k = 0; k < run; k += kQuad, panel += kTileN * kQuad) {
      __m512i w[kHalves];
      for (int h = 0; h < kHalves; ++h) w[h] = _mm512_loadu_si512(panel + h * 64);
#pragma GCC unroll 12
      for (int i = 0; i < kM; ++i) {
        const __m512i xi = broadcast4(x[i] + k);
        for (int h = 0; h < kHalves; ++h) c[i][h] = _mm512_dpbusd_epi32(c[i][h], w[h], xi);
      }
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < kHalves; ++h) _mm512_storeu_si512(acc + i * kTileN + h * 16, c[i][h]);
}

template <int kM, int kHalves>
void tile_f32_fixed(const float* const* rows, int64_t taps, int64_t run, const float* panel, float* acc) {
  __m512 c[kM][kHalves];
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < kHalves; ++h) c[i][h] = _mm512_loadu_ps(acc + i * kTileN + h * 16);
  for (int64_t t = 0; t < taps; ++t, rows += kTileM) {
    const float* x[kM];
    for (int i = 0; i < kM; ++i) x[i] = rows[i];
#pragma GCC unroll 2
    for (int64_t k = 0; k < run; ++k, panel += kTileN) {
      __m512 w[kHalves];
      for (int h = 0; h < kHalves; ++h) w[h] = _mm512_loadu_ps(panel + h * 16);
#pragma GCC unroll 12
      for (int i = 0; i < kM; ++i) {
        const __m512 xi = _mm512_set1_ps(x[i][k]);
        for (int h = 0; h < kHalves; ++h) c[i][h] = _mm512_fmadd_ps(xi, w[h], c[i][h]);
      }
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < kHalves; ++h) _mm512_storeu_ps(acc + i * kTileN + h * 16, c[i][h]);
}

#define CORA_TILES(f)                                                                                       \
  {f<1, 1>, f<1, 2>}, {f<2, 1>, f<2, 2>}, {f<3, 1>, f<3, 2>}, {f<4, 1>, f<4, 2>}, {f<5, 1>, f<5, 2>},       \
      {f<6, 1>, f<6, 2>}, {f<7, 1>, f<7, 2>}, {f<8, 1>, f<8, 2>}, {f<9, 1>, f<9, 2>}, {f<10, 1>, f<10, 2>}, \
      {f<11, 1>, f<11, 2>}, {                                                                               \
    f<12, 1>, f<12, 2>                                                                                      \
  }

/// Dwords at codes + lane * ld + at for 16 lanes from `first`; lanes that do not exist give 0.
inline __m512i gather(const uint8_t* codes, __m512i offsets, __mmask16 lanes, int64_t at) {
  return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes, offsets, codes + at, 1);
}

}  // namespace

void interleave(const uint8_t* codes, int64_t ld, int lanes, int64_t taps, int64_t run, uint8_t* panel) {
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(steps, _mm512_set1_epi32(static_cast<int32_t>(ld)));
  const int64_t quads = (run + kQuad - 1) / kQuad;
  const __m512i even = _mm512_set1_epi32(0x00ff00ff), low = _mm512_set1_epi32(0x0000ffff);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* source = codes + half * 16 * ld;
    const __mmask16 exist = mask16(lanes - half * 16);
    uint8_t* out = panel + half * 64;
    for (int64_t q = 0; q < quads; ++q) {
      const int64_t left = run - q * kQuad;  // 1..3 in the last, ragged quad
      const __m512i keep = _mm512_set1_epi32(left >= 4 ? -1 : static_cast<int32_t>((1u << (8 * left)) - 1));
      if (taps == 1) {
        _mm512_storeu_si512(out + q * 128, _mm512_and_si512(gather(source, offsets, exist, q * 4), keep));
        continue;
      }
      // Four channels by four taps: each dword holds one channel's taps t..t+3; transpose 4x4 bytes.
      for (int64_t t = 0; t < taps; t += 4) {
        __m512i v[4];
        for (int i = 0; i < 4; ++i)
          v[i] = i < left ? gather(source, offsets, exist, (q * 4 + i) * taps + t) : _mm512_setzero_si512();
        const __m512i e01 =
            _mm512_or_si512(_mm512_and_si512(v[0], even), _mm512_slli_epi32(_mm512_and_si512(v[1], even), 8));
        const __m512i o01 =
            _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(v[0], 8), even), _mm512_andnot_si512(even, v[1]));
        const __m512i e23 =
            _mm512_or_si512(_mm512_and_si512(v[2], even), _mm512_slli_epi32(_mm512_and_si512(v[3], even), 8));
        const __m512i o23 =
            _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(v[2], 8), even), _mm512_andnot_si512(even, v[3]));
        const __m512i tap[4] = {
            _mm512_or_si512(_mm512_and_si512(e01, low), _mm512_slli_epi32(e23, 16)),
            _mm512_or_si512(_mm512_and_si512(o01, low), _mm512_slli_epi32(o23, 16)),
            _mm512_or_si512(_mm512_srli_epi32(e01, 16), _mm512_andnot_si512(low, e23)),
            _mm512_or_si512(_mm512_srli_epi32(o01, 16), _mm512_andnot_si512(low, o23)),
        };
        for (int64_t j = 0; j < 4 && t + j < taps; ++j) _mm512_storeu_si512(out + ((t + j) * quads + q) * 128, tap[j]);
      }
    }
  }
}

void panel_f32(const uint8_t* panel, const float* scale, const int32_t* zero_point, int64_t taps, int64_t run,
               float* out) {
  __m512 s[2];
  __m512i z[2];
  for (int h = 0; h < 2; ++h) {
    s[h] = _mm512_loadu_ps(scale + h * 16);
    z[h] = _mm512_loadu_si512(zero_point + h * 16);
  }
  const __m512i byte = _mm512_set1_epi32(0xff);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < run; c += kQuad, panel += kTileN * kQuad) {
      __m512i quad[2] = {_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64)};
      for (int64_t i = 0; i < kQuad && c + i < run; ++i, out += kTileN)
        for (int h = 0; h < 2; ++h) {
          const __m512i q = _mm512_sub_epi32(_mm512_and_si512(quad[h], byte), z[h]);
          _mm512_storeu_ps(out + h * 16, _mm512_mul_ps(s[h], _mm512_cvtepi32_ps(q)));
          quad[h] = _mm512_srli_epi32(quad[h], 8);
        }
    }
}

void tile_s8(const int8_t* const* rows, int64_t taps, int64_t run, const uint8_t* panel, int m, int lanes,
             int32_t* acc) {
  static constexpr decltype(&tile_s8_fixed<1, 1>) kTiles[kTileM][2] = {CORA_TILES(tile_s8_fixed)};
  kTiles[m - 1][lanes > 16](rows, taps, run, panel, acc);
}

void tile_f32(const float* const* rows, int64_t taps, int64_t run, const float* panel, int m, int lanes, float* acc) {
  static constexpr decltype(&tile_f32_fixed<1, 1>) kTiles[kTileM][2] = {CORA_TILES(tile_f32_fixed)};
  kTiles[m - 1][lanes > 16](rows, taps, run, panel, acc);
}

void row_sums(const int8_t* const* rows, int64_t taps, int64_t run, int m, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int i = 0; i < m; ++i) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < run; c += 64)
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(mask64(run - c), rows[t * kTileM + i] + c));
    sums[i] = sum_epi32(sum);
  }
}

void requantize(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* zw,
                const int32_t* xsum, const float* scale, float* c) {
  for (int h = 0; h < kTileN; h += 16) {
    const __m512i ws = _mm512_loadu_si512(wsum + h), z = _mm512_loadu_si512(zw + h);
    const __m512 s = _mm512_loadu_ps(scale + h);
    for (int i = 0; i < m; ++i) {
      __m512i sum = _mm512_loadu_si512(acc + i * kTileN + h);
      sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(ws, _mm512_set1_epi32(zx[i])));
      sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(z, _mm512_set1_epi32(xsum[i])));
      float* to = c + i * kTileN + h;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_mul_ps(_mm512_cvtepi32_ps(sum), s)));
    }
  }
}

void finish(const float* c, int m, int lanes, const float* sx, const float* u, int64_t ldu, const float* b,
            int64_t rank, const float* bias, float* y, int64_t ldy) {
  for (int h = 0; h < lanes; h += 16) {
    const __mmask16 mask = mask16(lanes - h);
    int i = 0;
    for (; i + 4 <= m; i += 4) {  // four rows at once: b is loaded once, the fma chains overlap
      __m512 v[4];
      for (int r = 0; r < 4; ++r) {
        v[r] = _mm512_loadu_ps(c + (i + r) * kTileN + h);
        if (sx != nullptr) v[r] = _mm512_mul_ps(v[r], _mm512_set1_ps(sx[i + r]));
      }
      for (int64_t j = 0; j < rank; ++j) {
        const __m512 bj = _mm512_loadu_ps(b + j * kTileN + h);
        for (int r = 0; r < 4; ++r) v[r] = _mm512_fmadd_ps(_mm512_set1_ps(u[(i + r) * ldu + j]), bj, v[r]);
      }
      for (int r = 0; r < 4; ++r) {
        if (bias != nullptr) v[r] = _mm512_add_ps(v[r], _mm512_loadu_ps(bias + h));
        _mm512_mask_storeu_ps(y + (i + r) * ldy + h, mask, v[r]);
      }
    }
    for (; i < m; ++i) {
      __m512 v = _mm512_loadu_ps(c + i * kTileN + h);
      if (sx != nullptr) v = _mm512_mul_ps(v, _mm512_set1_ps(sx[i]));
      for (int64_t j = 0; j < rank; ++j)
        v = _mm512_fmadd_ps(_mm512_set1_ps(u[i * ldu + j]), _mm512_loadu_ps(b + j * kTileN + h), v);
      if (bias != nullptr) v = _mm512_add_ps(v, _mm512_loadu_ps(bias + h));
      _mm512_mask_storeu_ps(y + i * ldy + h, mask, v);
    }
  }
}

void dot_s8(const uint8_t* codes, const int8_t* x, int64_t ldx, int m, int64_t count, int32_t* out) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[kDotM], code_sum = _mm512_setzero_si512();
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 64) {
    const __mmask64 mask = mask64(count - k);
    const __m512i w = _mm512_maskz_loadu_epi8(mask, codes + k);
    code_sum = _mm512_dpbusd_epi32(code_sum, w, ones);
    for (int i = 0; i < m; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], w, _mm512_maskz_loadu_epi8(mask, x + i * ldx + k));
  }
  for (int i = 0; i < m; ++i) out[i] = sum_epi32(sum[i]);
  out[m] = sum_epi32(code_sum);
}

void dot_f32(const uint8_t* codes, float zero_point, const float* x, int64_t ldx, int m, int64_t count, float* out) {
  const __m512 z = _mm512_set1_ps(zero_point);
  __m512 sum[kDotM][2];
  for (auto& s : sum) s[0] = s[1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 32)
    for (int h = 0; h < 2; ++h) {
      const __mmask16 mask = mask16(count - k - h * 16);
      const __m512i q = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + k + h * 16));
      const __m512 w = _mm512_sub_ps(_mm512_cvtepi32_ps(q), z);
      for (int i = 0; i < m; ++i)
        sum[i][h] = _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(mask, x + i * ldx + k + h * 16), sum[i][h]);
    }
  for (int i = 0; i < m; ++i) out[i] = sum_ps(_mm512_add_ps(sum[i][0], sum[i][1]));
}

void depthwise_f32(const float* const* rows, const float* w, int64_t taps, int64_t channels, float* y) {
  for (int64_t c = 0; c < channels; c += 16) {
    const __mmask16 mask = mask16(channels - c);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < taps; ++t)
      sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, w + t * channels + c), _mm512_maskz_loadu_ps(mask, rows[t] + c),
                            sum);
    _mm512_mask_storeu_ps(y + c, mask, sum);
  }
}

void depthwise_s8(const int8_t* const* rows, int32_t zx, const uint8_t* w, const int32_t* zw, const float* scale,
                  int64_t taps, int64_t channels, float* y) {
  const __m512i z = _mm512_set1_epi32(zx);
  for (int64_t c = 0; c < channels; c += 16) {
    const __mmask16 mask = mask16(channels - c);
    __m512i sum = _mm512_setzero_si512(), xsum = _mm512_setzero_si512();
    for (int64_t t = 0; t < taps; ++t) {
      const __m512i x = _mm512_sub_epi32(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, rows[t] + c)), z);
      const __m512i q = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w + t * channels + c));
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, q));  // both fit 16 bits, the high halves of q are 0
      xsum = _mm512_add_epi32(xsum, x);
    }
    sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(mask, zw + c), xsum));
    const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_maskz_loadu_ps(mask, scale + c));
    _mm512_mask_storeu_ps(y + c, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y + c), part));
  }
}

void depthwise_finish(float* y, float sx, const float* u, const float* b, const float* bias, int64_t channels) {
  for (int64_t c = 0; c < channels; c += 16) {
    const __mmask16 mask = mask16(channels - c);
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, y + c), _mm512_set1_ps(sx));
    if (u != nullptr) v = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, u + c), _mm512_maskz_loadu_ps(mask, b + c), v);
    if (bias != nullptr) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias + c));
    _mm512_mask_storeu_ps(y + c, mask, v);
  }
}

void transpose(const float* in, int64_t ldi, int64_t rows, int64_t cols, float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < cols; c += 16) {
      const __mmask16 row_mask = mask16(rows - r), col_mask = mask16(cols - c);
      __m512 v[16], t[16];
      for (int i = 0; i < 16; ++i)
        v[i] = r + i < rows ? _mm512_maskz_loadu_ps(col_mask, in + (r + i) * ldi + c) : _mm512_setzero_ps();
      // 16x16 in four rounds: pairs of rows, fours, eights, all.
      for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
      }
      for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
          const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
          v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
          v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
      for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
          t[i + j] = _mm512_shuffle_f32x4(v[i + j], v[i + j + 4], 0x88);
          t[i + j + 4] = _mm512_shuffle_f32x4(v[i + j], v[i + j + 4], 0xdd);
        }
      for (int j = 0; j < 8; ++j) {
        v[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
      }
      for (int i = 0; i < 16 && c + i < cols; ++i) _mm512_mask_storeu_ps(out + (c + i) * ldo + r, row_mask, v[i]);
    }
}

}  // namespace cora::cpu::avx512

CORA_END_TARGET
#endif
