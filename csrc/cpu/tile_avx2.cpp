// The layer kernels, AVX2 + FMA.
// Method: the 12 x 32 tile is done in pieces of 16 weight rows: 6 x 16 floats (12 accumulators, two
// panel vectors, one broadcast), or 4 x 16 integers. vpmaddubsw adds two products of an unsigned and a
// signed byte into 16 bits: exact up to weight codes of 127, so bit 7 of a code is multiplied apart.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AVX2

namespace cora::cpu::avx2 {

namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline __m256i broadcast4(const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  return _mm256_set1_epi32(quad);
}

inline int32_t sum_epi32(__m256i v) {
  const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i pair = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
}

inline float sum_ps(__m256 v) {
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

/// acc + the four products of each dword, u <= 127 or u = 128 (then x * 128 * 2 just fits 16 bits).
inline __m256i add_products(__m256i acc, __m256i u, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1)));
}

template <int kM>
void tile_s8_fixed(const int8_t* const* rows, int64_t taps, int64_t run, const uint8_t* panel, int32_t* acc) {
  const __m256i bit7 = _mm256_set1_epi8(static_cast<char>(0x80));
  __m256i c[kM][2];
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < 2; ++h) c[i][h] = load(acc + i * kTileN + h * 8);
  for (int64_t t = 0; t < taps; ++t, rows += kTileM)
    for (int64_t k = 0; k < run; k += kQuad, panel += kTileN * kQuad) {
      const __m256i w[2] = {load(panel), load(panel + 32)};
      if (_mm256_testz_si256(_mm256_or_si256(w[0], w[1]), bit7)) {
#pragma GCC unroll 4
        for (int i = 0; i < kM; ++i) {
          const __m256i x = broadcast4(rows[i] + k);
          for (int h = 0; h < 2; ++h) c[i][h] = add_products(c[i][h], w[h], x);
        }
      } else {
        for (int i = 0; i < kM; ++i) {
          const __m256i x = broadcast4(rows[i] + k);
          for (int h = 0; h < 2; ++h) {
            c[i][h] = add_products(c[i][h], _mm256_andnot_si256(bit7, w[h]), x);
            c[i][h] = add_products(c[i][h], _mm256_and_si256(bit7, w[h]), x);
          }
        }
      }
    }
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < 2; ++h) store(acc + i * kTileN + h * 8, c[i][h]);
}

template <int kM>
void tile_f32_fixed(const float* const* rows, int64_t taps, int64_t run, const float* panel, float* acc) {
  __m256 c[kM][2];
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < 2; ++h) c[i][h] = _mm256_loadu_ps(acc + i * kTileN + h * 8);
  for (int64_t t = 0; t < taps; ++t, rows += kTileM) {
    const float* x[kM];
    for (int i = 0; i < kM; ++i) x[i] = rows[i];
    for (int64_t k = 0; k < run; ++k, panel += kTileN) {
      const __m256 w0 = _mm256_loadu_ps(panel), w1 = _mm256_loadu_ps(panel + 8);
#pragma GCC unroll 6
      for (int i = 0; i < kM; ++i) {
        const __m256 xi = _mm256_broadcast_ss(x[i] + k);
        c[i][0] = _mm256_fmadd_ps(xi, w0, c[i][0]);
        c[i][1] = _mm256_fmadd_ps(xi, w1, c[i][1]);
      }
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(acc + i * kTileN + h * 8, c[i][h]);
}

inline __m256i lane_mask(int lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

}  // namespace

void interleave(const uint8_t* codes, int64_t ld, int lanes, int64_t taps, int64_t run, uint8_t* panel) {
  const __m256i offsets =
      _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int32_t>(ld)));
  const int64_t quads = (run + kQuad - 1) / kQuad;
  const __m256i zero = _mm256_setzero_si256();
  const __m256i even = _mm256_set1_epi32(0x00ff00ff), low = _mm256_set1_epi32(0x0000ffff);
  for (int first = 0; first < kTileN; first += 8) {
    const uint8_t* source = codes + first * ld;
    const __m256i exist = lane_mask(lanes - first);
    const auto gather = [&](int64_t at) {
      return _mm256_mask_i32gather_epi32(zero, reinterpret_cast<const int*>(source + at), offsets, exist, 1);
    };
    uint8_t* out = panel + first * kQuad;
    for (int64_t q = 0; q < quads; ++q) {
      const int64_t left = run - q * kQuad;  // 1..3 in the last, ragged quad
      const __m256i keep = _mm256_set1_epi32(left >= 4 ? -1 : static_cast<int32_t>((1u << (8 * left)) - 1));
      if (taps == 1) {
        store(out + q * 128, _mm256_and_si256(gather(q * 4), keep));
        continue;
      }
      // Four channels by four taps: each dword holds one channel's taps t..t+3; transpose 4x4 bytes.
      for (int64_t t = 0; t < taps; t += 4) {
        __m256i v[4];
        for (int i = 0; i < 4; ++i) v[i] = i < left ? gather((q * 4 + i) * taps + t) : zero;
        const __m256i e01 =
            _mm256_or_si256(_mm256_and_si256(v[0], even), _mm256_slli_epi32(_mm256_and_si256(v[1], even), 8));
        const __m256i o01 =
            _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(v[0], 8), even), _mm256_andnot_si256(even, v[1]));
        const __m256i e23 =
            _mm256_or_si256(_mm256_and_si256(v[2], even), _mm256_slli_epi32(_mm256_and_si256(v[3], even), 8));
        const __m256i o23 =
            _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(v[2], 8), even), _mm256_andnot_si256(even, v[3]));
        const __m256i tap[4] = {
            _mm256_or_si256(_mm256_and_si256(e01, low), _mm256_slli_epi32(e23, 16)),
            _mm256_or_si256(_mm256_and_si256(o01, low), _mm256_slli_epi32(o23, 16)),
            _mm256_or_si256(_mm256_srli_epi32(e01, 16), _mm256_andnot_si256(low, e23)),
            _mm256_or_si256(_mm256_srli_epi32(o01, 16), _mm256_andnot_si256(low, o23)),
        };
        for (int64_t j = 0; j < 4 && t + j < taps; ++j) store(out + ((t + j) * quads + q) * 128, tap[j]);
      }
    }
  }
}

void panel_f32(const uint8_t* panel, const float* scale, const int32_t* zero_point, int64_t taps, int64_t run,
               float* out) {
  const __m256i byte = _mm256_set1_epi32(0xff);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < run; c += kQuad, panel += kTileN * kQuad) {
      const int64_t left = run - c < kQuad ? run - c : kQuad;
      for (int n = 0; n < kTileN; n += 8) {
        const __m256 s = _mm256_loadu_ps(scale + n);
        const __m256i z = load(zero_point + n);
        __m256i quad = load(panel + n * kQuad);
        for (int64_t i = 0; i < left; ++i) {
          const __m256i q = _mm256_sub_epi32(_mm256_and_si256(quad, byte), z);
          _mm256_storeu_ps(out + i * kTileN + n, _mm256_mul_ps(s, _mm256_cvtepi32_ps(q)));
          quad = _mm256_srli_epi32(quad, 8);
        }
      }
      out += left * kTileN;
    }
}

void tile_s8(const int8_t* const* rows, int64_t taps, int64_t run, const uint8_t* panel, int m, int lanes,
             int32_t* acc) {
  static constexpr decltype(&tile_s8_fixed<1>) kTiles[4] = {tile_s8_fixed<1>, tile_s8_fixed<2>, tile_s8_fixed<3>,
                                                            tile_s8_fixed<4>};
  for (int n = 0; n < lanes; n += 16)
    for (int i = 0; i < m; i += 4)
      kTiles[(m - i < 4 ? m - i : 4) - 1](rows + i, taps, run, panel + n * kQuad, acc + i * kTileN + n);
}

void tile_f32(const float* const* rows, int64_t taps, int64_t run, const float* panel, int m, int lanes, float* acc) {
  static constexpr decltype(&tile_f32_fixed<1>) kTiles[6] = {tile_f32_fixed<1>, tile_f32_fixed<2>, tile_f32_fixed<3>,
                                                             tile_f32_fixed<4>, tile_f32_fixed<5>, tile_f32_fixed<6>};
  for (int n = 0; n < lanes; n += 16)
    for (int i = 0; i < m; i += 6)
      kTiles[(m - i < 6 ? m - i : 6) - 1](rows + i, taps, run, panel + n, acc + i * kTileN + n);
}

void row_sums(const int8_t* const* rows, int64_t taps, int64_t run, int m, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi8(1);
  for (int i = 0; i < m; ++i) {
    __m256i sum = _mm256_setzero_si256();
    int32_t rest = 0;
    for (int64_t t = 0; t < taps; ++t) {
      const int8_t* x = rows[t * kTileM + i];
      int64_t c = 0;
      for (; c + 32 <= run; c += 32) sum = add_products(sum, ones, load(x + c));
      for (; c < run; ++c) rest += x[c];
    }
    sums[i] = sum_epi32(sum) + rest;
  }
}

void requantize(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* zw,
                const int32_t* xsum, const float* scale, float* c) {
  for (int n = 0; n < kTileN; n += 8) {
    const __m256i ws = load(wsum + n), z = load(zw + n);
    const __m256 s = _mm256_loadu_ps(scale + n);
    for (int i = 0; i < m; ++i) {
      __m256i sum = load(acc + i * kTileN + n);
      sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(ws, _mm256_set1_epi32(zx[i])));
      sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(z, _mm256_set1_epi32(xsum[i])));
      float* to = c + i * kTileN + n;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_mul_ps(_mm256_cvtepi32_ps(sum), s)));
    }
  }
}

void finish(const float* c, int m, int lanes, const float* sx, const float* u, int64_t ldu, const float* b,
            int64_t rank, const float* bias, float* y, int64_t ldy) {
  for (int n = 0; n < lanes; n += 8) {
    const bool whole = lanes - n >= 8;
    const __m256i mask = lane_mask(lanes - n);
    for (int i = 0; i < m; i += 4) {  // up to four rows at once: the fma chains overlap
      const int rows = m - i < 4 ? m - i : 4;
      __m256 v[4];
      for (int r = 0; r < 4; ++r) {
        v[r] = _mm256_loadu_ps(c + (r < rows ? i + r : i) * kTileN + n);
        if (sx != nullptr) v[r] = _mm256_mul_ps(v[r], _mm256_set1_ps(sx[r < rows ? i + r : i]));
      }
      for (int64_t j = 0; j < rank; ++j) {
        const __m256 bj = _mm256_loadu_ps(b + j * kTileN + n);
        for (int r = 0; r < 4; ++r)
          v[r] = _mm256_fmadd_ps(_mm256_set1_ps(u[(r < rows ? i + r : i) * ldu + j]), bj, v[r]);
      }
      for (int r = 0; r < rows; ++r) {
        if (bias != nullptr) v[r] = _mm256_add_ps(v[r], _mm256_loadu_ps(bias + n));
        float* to = y + (i + r) * ldy + n;
        if (whole)
          _mm256_storeu_ps(to, v[r]);
        else
          _mm256_maskstore_ps(to, mask, v[r]);
      }
    }
  }
}

void dot_s8(const uint8_t* codes, const int8_t* x, int64_t ldx, int m, int64_t count, int32_t* out) {
  const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi8(1);
  const __m256i bit7 = _mm256_set1_epi8(static_cast<char>(0x80));
  __m256i sum[kDotM + 1] = {zero, zero, zero, zero, zero};
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const __m256i w = load(codes + k), high = _mm256_and_si256(w, bit7), rest = _mm256_andnot_si256(bit7, w);
    const bool wide = !_mm256_testz_si256(w, bit7);
    for (int i = 0; i <= m; ++i) {
      const __m256i v = i < m ? load(x + i * ldx + k) : ones;
      sum[i] = add_products(sum[i], rest, v);
      if (wide) sum[i] = add_products(sum[i], high, v);
    }
  }
  scalar::dot_s8(codes + k, x + k, ldx, m, count - k, out);
  for (int i = 0; i <= m; ++i) out[i] += sum_epi32(sum[i]);
}

void dot_f32(const uint8_t* codes, float zero_point, const float* x, int64_t ldx, int m, int64_t count, float* out) {
  const __m256 z = _mm256_set1_ps(zero_point);
  __m256 sum[kDotM][2];
  for (auto& s : sum) s[0] = s[1] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    for (int h = 0; h < 2; ++h) {
      const __m256i q = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + k + h * 8)));
      const __m256 w = _mm256_sub_ps(_mm256_cvtepi32_ps(q), z);
      for (int i = 0; i < m; ++i) sum[i][h] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i * ldx + k + h * 8), sum[i][h]);
    }
  scalar::dot_f32(codes + k, zero_point, x + k, ldx, m, count - k, out);
  for (int i = 0; i < m; ++i) out[i] += sum_ps(_mm256_add_ps(sum[i][0], sum[i][1]));
}

void depthwise_f32(const float* const* rows, const float* w, int64_t taps, int64_t channels, float* y) {
  for (int64_t c = 0; c < channels; c += 8) {
    const __m256i mask = lane_mask(channels - c < 8 ? static_cast<int>(channels - c) : 8);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t t = 0; t < taps; ++t)
      sum = _mm256_fmadd_ps(_mm256_maskload_ps(w + t * channels + c, mask), _mm256_maskload_ps(rows[t] + c, mask), sum);
    _mm256_maskstore_ps(y + c, mask, sum);
  }
}

void depthwise_s8(const int8_t* const* rows, int32_t zx, const uint8_t* w, const int32_t* zw, const float* scale,
                  int64_t taps, int64_t channels, float* y) {
  const __m256i z = _mm256_set1_epi32(zx);
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    __m256i sum = _mm256_setzero_si256(), xsum = _mm256_setzero_si256();
    for (int64_t t = 0; t < taps; ++t) {
      const __m128i x8 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[t] + c));
      const __m128i q8 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + t * channels + c));
      const __m256i x = _mm256_sub_epi32(_mm256_cvtepi8_epi32(x8), z);
      // Both fit 16 bits and the high halves of the codes are 0: madd is a 32-bit product.
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, _mm256_cvtepu8_epi32(q8)));
      xsum = _mm256_add_epi32(xsum, x);
    }
    sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(load(zw + c), xsum));
    const __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(scale + c));
    _mm256_storeu_ps(y + c, _mm256_add_ps(_mm256_loadu_ps(y + c), part));
  }
  for (; c < channels; ++c) {
    int32_t sum = 0, xsum = 0;
    for (int64_t t = 0; t < taps; ++t) {
      sum += (rows[t][c] - zx) * w[t * channels + c];
      xsum += rows[t][c] - zx;
    }
    const uint32_t s = static_cast<uint32_t>(sum) - static_cast<uint32_t>(zw[c]) * static_cast<uint32_t>(xsum);
    y[c] += static_cast<float>(static_cast<int32_t>(s)) * scale[c];
  }
}

void depthwise_finish(float* y, float sx, const float* u, const float* b, const float* bias, int64_t channels) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    __m256 v = _mm256_mul_ps(_mm256_loadu_ps(y + c), _mm256_set1_ps(sx));
    if (u != nullptr) v = _mm256_fmadd_ps(_mm256_loadu_ps(u + c), _mm256_loadu_ps(b + c), v);
    if (bias != nullptr) v = _mm256_add_ps(v, _mm256_loadu_ps(bias + c));
    _mm256_storeu_ps(y + c, v);
  }
  scalar::depthwise_finish(y + c, sx, u ? u + c : nullptr, b ? b + c : nullptr, bias ? bias + c : nullptr,
                           channels - c);
}

void transpose(const float* in, int64_t ldi, int64_t rows, int64_t cols, float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    int64_t c = 0;
    for (; c + 8 <= cols; c += 8) {
      __m256 v[8], t[8];
      for (int i = 0; i < 8; ++i) v[i] = _mm256_loadu_ps(in + (r + i) * ldi + c);
      for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
      }
      for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
          const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
          v[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
          v[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + (c + i) * ldo + r, _mm256_permute2f128_ps(v[i], v[i + 4], 0x20));
        _mm256_storeu_ps(out + (c + i + 4) * ldo + r, _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
      }
    }
    scalar::transpose(in + r * ldi + c, ldi, 8, cols - c, out + c * ldo + r, ldo);
  }
  scalar::transpose(in + r * ldi, ldi, rows - r, cols, out + r, ldo);
}

}  // namespace cora::cpu::avx2

CORA_END_TARGET
#endif
