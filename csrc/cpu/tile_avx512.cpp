// The layer kernels, AVX-512 with VNNI and VBMI.
// Method: a tile is 12 rows of x by 32 weight rows: 24 accumulators, two panel vectors and a broadcast
// operand, so each loaded panel vector feeds 12 FMAs (or vpdpbusd: unsigned codes of x times signed
// weights, four of K a lane).
#include "bits.h"
#include "cpu/codes_avx512.h"
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AVX512

namespace cora::cpu::avx512 {

namespace {

constexpr int kTileM = 12;

inline __mmask16 mask16(int64_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xffff) : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}
inline __mmask64 mask64(int64_t left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

inline __m512i broadcast4(const uint8_t* x) {
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

template <int kBits>
void expand_fixed(const uint8_t* packed, int64_t rows, const uint8_t* offset, int8_t* panel) {
  const Expander<kBits> expander(offset);
#pragma GCC unroll 2
  for (int64_t r = 0; r < rows; ++r, packed += quad_row_bytes(kBits), panel += kQuadRow) {
    prefetch_packed<kPanelAhead>(packed, quad_row_bytes(kBits));
    expander.quad_row(packed, panel);
  }
}

/// kHalves vectors of 16 weight rows by kM rows of x.
template <int kM, int kHalves>
void tile_s8_fixed(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
                   int32_t* acc) {
  __m512i c[kM][kHalves];
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < kHalves; ++h) c[i][h] = _mm512_setzero_si512();
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* x[kM];
    for (int i = 0; i < kM; ++i) x[i] = rows[i] + tap[t];
#pragma GCC unroll 2
    for (int64_t k = 0; k < quads * kQuad; k += kQuad, panel += kQuadRow) {
      __m512i w[kHalves];
      for (int h = 0; h < kHalves; ++h) w[h] = _mm512_loadu_si512(panel + h * 64);
#pragma GCC unroll 12
      for (int i = 0; i < kM; ++i) {
        const __m512i xi = broadcast4(x[i] + k);
        for (int h = 0; h < kHalves; ++h) c[i][h] = _mm512_dpbusd_epi32(c[i][h], xi, w[h]);
      }
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < kHalves; ++h) _mm512_storeu_si512(acc + i * kLanes + h * 16, c[i][h]);
}

template <int kM, int kHalves>
void tile_f32_fixed(const float* const* rows, const int64_t* tap, int64_t taps, int64_t run, const float* panel,
                    float* acc) {
  __m512 c[kM][kHalves];
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < kHalves; ++h) c[i][h] = _mm512_loadu_ps(acc + i * kLanes + h * 16);
  for (int64_t t = 0; t < taps; ++t) {
    const float* x[kM];
    for (int i = 0; i < kM; ++i) x[i] = rows[i] + tap[t];
#pragma GCC unroll 2
    for (int64_t k = 0; k < run; ++k, panel += kLanes) {
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
    for (int h = 0; h < kHalves; ++h) _mm512_storeu_ps(acc + i * kLanes + h * 16, c[i][h]);
}

#define CORA_TILES(f)                                                                                       \
  {f<1, 1>, f<1, 2>}, {f<2, 1>, f<2, 2>}, {f<3, 1>, f<3, 2>}, {f<4, 1>, f<4, 2>}, {f<5, 1>, f<5, 2>},       \
      {f<6, 1>, f<6, 2>}, {f<7, 1>, f<7, 2>}, {f<8, 1>, f<8, 2>}, {f<9, 1>, f<9, 2>}, {f<10, 1>, f<10, 2>}, \
      {f<11, 1>, f<11, 2>}, {                                                                               \
    f<12, 1>, f<12, 2>                                                                                      \
  }

template <int kRows>
void up_project_rows(const float* u, int64_t rank, const float* b, float* up) {
  __m512 v[kRows][2];
  for (auto& row : v) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t j = 0; j < rank; ++j, b += kLanes) {
    const __m512 w[2] = {_mm512_loadu_ps(b), _mm512_loadu_ps(b + 16)};
    const float* chunk = u + j / kLanes * kHiddenChunk + j % kLanes;
    for (int i = 0; i < kRows; ++i)
      for (int h = 0; h < 2; ++h) v[i][h] = _mm512_fmadd_ps(_mm512_set1_ps(chunk[i * kLanes]), w[h], v[i][h]);
  }
  for (int i = 0; i < kRows; ++i)
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(up + i * kLanes + h * 16, v[i][h]);
}

enum Add { kNothing, kFloats, kCodes };

/// Two rows at a time: their 64 codes are packed together.
enum Up { kNone, kTile, kInline };

template <bool kAcc, Up kUp, bool kOutCodes, Add kAdd>
void epilogue_rows(const Epilogue& e, int m, int lanes, const int64_t* at, const int64_t* add_at) {
  const __mmask16 masks[2] = {mask16(lanes), mask16(lanes - 16)};
  const __mmask32 mask = static_cast<__mmask32>(masks[1]) << 16 | masks[0];
  const __m512 low = _mm512_set1_ps(kOutCodes ? e.code_low : e.low);
  const __m512 high = _mm512_set1_ps(kOutCodes ? e.code_high : e.high);
  const __m512 inverse = _mm512_set1_ps(e.inverse_scale);
  const __m512 add_scale = _mm512_set1_ps(e.add_scale), add_zero = _mm512_set1_ps(e.add_zero);
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(e.zero_point));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i correction[2];
  __m512 alpha[2], bias[2];
  for (int h = 0; h < 2; ++h) {
    correction[h] = kAcc ? _mm512_loadu_si512(e.correction + 16 * h) : _mm512_setzero_si512();
    alpha[h] = kAcc || e.alpha != nullptr ? _mm512_loadu_ps(e.alpha + 16 * h) : _mm512_set1_ps(1.0f);
    bias[h] = e.bias != nullptr ? _mm512_loadu_ps(e.bias + 16 * h) : _mm512_setzero_ps();
  }
  const auto row = [&](int i, int h) {
    const int k = i * kLanes + 16 * h;
    __m512 v = kAcc ? _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(e.acc + k), correction[h]))
                    : _mm512_loadu_ps(e.c + k);
    const bool by_row = !kAcc && e.row_scale != nullptr;
    v = _mm512_fmadd_ps(v, by_row ? _mm512_set1_ps(e.row_scale[i]) : alpha[h], bias[h]);
    if (kUp == kInline)
      for (int64_t j = 0; j < e.rank; ++j)
        v = _mm512_fmadd_ps(_mm512_set1_ps(e.u[i * kLanes + j]), _mm512_loadu_ps(e.b + j * kLanes + 16 * h), v);
    if (kUp == kTile) v = _mm512_add_ps(v, _mm512_loadu_ps(e.up + k));
    if (kAdd == kCodes) {
      const uint8_t* from = static_cast<const uint8_t*>(e.add) + add_at[i] + 16 * h;
      const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(masks[h], from)));
      v = _mm512_fmadd_ps(_mm512_sub_ps(code, add_zero), add_scale, v);
    } else if (kAdd == kFloats) {
      v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(masks[h], static_cast<const float*>(e.add) + add_at[i] + 16 * h));
    }
    // A NaN leaves the second operand: as a float it stays, as a code it is the least.
    if (!kOutCodes) return _mm512_min_ps(high, _mm512_max_ps(low, v));
    return _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(v, inverse), low), high);
  };
  for (int i = 0; i < m; i += 2) {
    const int second = i + 1 < m ? i + 1 : i;
    if (at[i] < 0 && at[second] < 0) continue;
    const int sources[2] = {at[i] < 0 ? second : i, at[second] < 0 ? i : second};  // a row that is there
    __m512 v[2][2];
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < 2; ++h) v[r][h] = row(sources[r], h);
    if (kOutCodes) {
      __m512i words[2];
      for (int r = 0; r < 2; ++r)
        words[r] =
            _mm512_adds_epi16(_mm512_packs_epi32(_mm512_cvtps_epi32(v[r][0]), _mm512_cvtps_epi32(v[r][1])), zero);
      const __m512i codes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words[0], words[1]));
      uint8_t* y = static_cast<uint8_t*>(e.y);
      _mm256_mask_storeu_epi8(y + at[sources[0]], mask, _mm512_castsi512_si256(codes));
      _mm256_mask_storeu_epi8(y + at[sources[1]], mask, _mm512_extracti64x4_epi64(codes, 1));
    } else {
      for (int r = 0; r < 2; ++r)
        for (int h = 0; h < 2; ++h)
          _mm512_mask_storeu_ps(static_cast<float*>(e.y) + at[sources[r]] + 16 * h, masks[h], v[r][h]);
    }
  }
}
#define CORA_ADDS(acc, up, codes)                                                   \
  {epilogue_rows<acc, up, codes, kNothing>, epilogue_rows<acc, up, codes, kFloats>, \
   epilogue_rows<acc, up, codes, kCodes>}
#define CORA_UPS(acc)                                                  \
  {                                                                    \
    {CORA_ADDS(acc, kNone, false), CORA_ADDS(acc, kNone, true)},       \
        {CORA_ADDS(acc, kTile, false), CORA_ADDS(acc, kTile, true)}, { \
      CORA_ADDS(acc, kInline, false), CORA_ADDS(acc, kInline, true)    \
    }                                                                  \
  }

template <int kBits, int kM>
void gemv_s8_fixed(const uint8_t* packed, int64_t rows, const uint8_t* x, int64_t ldx, int32_t* acc) {
  constexpr int kWays = kM == 1 ? 4 : kM == 2 ? 2 : 1;  // chains enough to hide the dot product's latency
  __m512i sum[kWays][kM][2];
  for (auto& way : sum)
    for (auto& row : way) row[0] = row[1] = _mm512_setzero_si512();
  const __m512i bit7 = _mm512_set1_epi8(static_cast<char>(0x80));
  const auto step = [&](int way, int64_t r) {
    __m512i w[2];
    load_codes<kBits>(packed + r * quad_row_bytes(kBits), w);
    if (kBits == 8)
      for (auto& v : w) v = _mm512_xor_si512(v, bit7);
    for (int i = 0; i < kM; ++i) {
      const __m512i xi = broadcast4(x + i * ldx + r * kQuad);
      for (int h = 0; h < 2; ++h) sum[way][i][h] = _mm512_dpbusd_epi32(sum[way][i][h], xi, w[h]);
    }
  };
  int64_t r = 0;
  for (; r + kWays <= rows; r += kWays) {
    prefetch_packed(packed + r * quad_row_bytes(kBits), kWays * quad_row_bytes(kBits));
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) step(way, r + way);
  }
  for (; r < rows; ++r) step(0, r);
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < 2; ++h) {
      __m512i total = sum[0][i][h];
      for (int way = 1; way < kWays; ++way) total = _mm512_add_epi32(total, sum[way][i][h]);
      _mm512_storeu_si512(acc + i * kLanes + h * 16, total);
    }
}

template <int kBits, int kM>
void gemv_f32_fixed(const uint8_t* packed, int64_t rows, const float* zero_point, const float* x, int64_t ldx,
                    float* c) {
  // Up to four bits a permute of 16 floats turns codes into values: it looks at the low four bits only.
  constexpr bool kLookup = kBits <= 4;
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i byte = _mm512_set1_epi32(0xff);
  const __m512 z[2] = {_mm512_loadu_ps(zero_point), _mm512_loadu_ps(zero_point + 16)};
  constexpr int kWays = kM == 1 ? 2 : 1;
  __m512 sum[kWays][kM][2];
  for (auto& way : sum)
    for (auto& row : way) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; ++r) {
    prefetch_packed(packed + r * quad_row_bytes(kBits), quad_row_bytes(kBits));
    __m512i w[2];
    load_codes<kBits>(packed + r * quad_row_bytes(kBits), w);
#pragma GCC unroll 4
    for (int j = 0; j < kQuad; ++j)
      for (int h = 0; h < 2; ++h) {
        const __m512i code = j == 0 ? w[h] : _mm512_srli_epi32(w[h], 8 * j);
        const __m512 value =
            kLookup ? _mm512_permutexvar_ps(code, values) : _mm512_cvtepi32_ps(_mm512_and_si512(code, byte));
        const __m512 exact = _mm512_sub_ps(value, z[h]);
        for (int i = 0; i < kM; ++i)
          sum[j % kWays][i][h] =
              _mm512_fmadd_ps(exact, _mm512_set1_ps(x[i * ldx + r * kQuad + j]), sum[j % kWays][i][h]);
      }
  }
  for (int i = 0; i < kM; ++i)
    for (int h = 0; h < 2; ++h) {
      __m512 total = sum[0][i][h];
      for (int way = 1; way < kWays; ++way) total = _mm512_add_ps(total, sum[way][i][h]);
      _mm512_storeu_ps(c + i * kLanes + h * 16, total);
    }
}

}  // namespace

void expand(const uint8_t* packed, int bits, int64_t rows, const uint8_t* offset, int8_t* panel) {
  CORA_DISPATCH_BITS(bits, [&] { expand_fixed<kBits>(packed, rows, offset, panel); });
}

void panel_f32(const int8_t* panel, int64_t rows, const float* scale, const int32_t* far, float* out) {
  const __m512 s[2] = {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + 16)};
  const __m512i f[2] = {_mm512_loadu_si512(far), _mm512_loadu_si512(far + 16)};
  for (int64_t r = 0; r < rows; ++r, panel += kQuadRow) {
    __m512i quad[2] = {_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64)};
    for (int i = 0; i < kQuad; ++i, out += kLanes)
      for (int h = 0; h < 2; ++h) {
        const __m512i w = _mm512_sub_epi32(_mm512_srai_epi32(_mm512_slli_epi32(quad[h], 24 - 8 * i), 24), f[h]);
        _mm512_storeu_ps(out + h * 16, _mm512_mul_ps(s[h], _mm512_cvtepi32_ps(w)));
      }
  }
}

void tile_s8(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
             int /*widest*/, int m, int /*block*/, int lanes, int32_t* acc) {
  static constexpr decltype(&tile_s8_fixed<1, 1>) kTiles[kTileM][2] = {CORA_TILES(tile_s8_fixed)};
  kTiles[m - 1][lanes > 16](rows, tap, taps, quads, panel, acc);
}

void tile_f32(const float* const* rows, const int64_t* tap, int64_t taps, int64_t run, const float* panel, int m,
              int lanes, float* c) {
  static constexpr decltype(&tile_f32_fixed<1, 1>) kTiles[kTileM][2] = {CORA_TILES(tile_f32_fixed)};
  kTiles[m - 1][lanes > 16](rows, tap, taps, run, panel, c);
}

void row_sums(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t run, int m, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int i = 0; i < m; ++i) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < run; c += 64)
        sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_loadu_epi8(mask64(run - c), rows[i] + tap[t] + c), ones);
    sums[i] = sum_epi32(sum);
  }
}

void requantize(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* far,
                const int32_t* xsum, const float* scale, bool add, float* c) {
  for (int h = 0; h < kLanes; h += 16) {
    const __m512i ws = _mm512_loadu_si512(wsum + h), f = _mm512_loadu_si512(far + h);
    const __m512 s = _mm512_loadu_ps(scale + h);
    for (int i = 0; i < m; ++i) {
      __m512i sum = _mm512_loadu_si512(acc + i * kLanes + h);
      sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(ws, _mm512_set1_epi32(zx[i])));
      sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(f, _mm512_set1_epi32(xsum[i])));
      float* to = c + i * kLanes + h;
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), s);
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), value) : value);
    }
  }
}

void store_hidden(const float* c, int m, int /*ranks*/, void* u) {
  std::memcpy(u, c, static_cast<size_t>(m) * kLanes * sizeof(float));
}

void quantized_hidden(const int32_t* acc, const int32_t* correction, const float* alpha, int m, int ranks, void* u) {
  float* out = static_cast<float*>(u);
  for (int h = 0; h < ranks; h += 16) {
    const __m512i c = _mm512_loadu_si512(correction + h);
    const __m512 a = _mm512_loadu_ps(alpha + h);
    for (int k = h; k < m * kLanes; k += kLanes)
      _mm512_storeu_ps(out + k, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(acc + k), c)), a));
  }
}

void expand_up(const int8_t* b, int64_t rank, void* out) {
  float* to = static_cast<float*>(out);
  for (int64_t i = 0; i < rank * kLanes; i += 16)
    _mm512_storeu_ps(
        to + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i)))));
}

void up_project(const void* u, int m, int /*block*/, int64_t rank, const void* b, float* up) {
  const float *hidden = static_cast<const float*>(u), *w = static_cast<const float*>(b);
  int i = 0;
  for (; i + 6 <= m; i += 6) up_project_rows<6>(hidden + i * kLanes, rank, w, up + i * kLanes);
  for (; i < m; ++i) up_project_rows<1>(hidden + i * kLanes, rank, w, up + i * kLanes);
}

void epilogue(const Epilogue& e, int m, int lanes, const int64_t* at, const int64_t* add_at) {
  const int add = e.add == nullptr ? 0 : e.add_codes ? 2 : 1;
  const int up = e.u != nullptr ? kInline : e.up != nullptr ? kTile : kNone;
  static constexpr EpilogueFn* kRows[2][3][2][3] = {CORA_UPS(false), CORA_UPS(true)};
  kRows[e.acc != nullptr][up][e.codes][add](e, m, lanes, at, add_at);
}

void gemv_s8(const uint8_t* packed, int bits, int64_t rows, const uint8_t* x, int64_t ldx, int m, int32_t* acc) {
  CORA_DISPATCH_BITS(bits, [&] {
    static constexpr decltype(&gemv_s8_fixed<kBits, 1>) kRows[kGemvM] = {
        gemv_s8_fixed<kBits, 1>, gemv_s8_fixed<kBits, 2>, gemv_s8_fixed<kBits, 3>, gemv_s8_fixed<kBits, 4>};
    kRows[m - 1](packed, rows, x, ldx, acc);
  });
}

void gemv_f32(const uint8_t* packed, int bits, int64_t rows, const float* zero_point, const float* x, int64_t ldx,
              int m, float* c) {
  CORA_DISPATCH_BITS(bits, [&] {
    static constexpr decltype(&gemv_f32_fixed<kBits, 1>) kRows[kGemvM] = {
        gemv_f32_fixed<kBits, 1>, gemv_f32_fixed<kBits, 2>, gemv_f32_fixed<kBits, 3>, gemv_f32_fixed<kBits, 4>};
    kRows[m - 1](packed, rows, zero_point, x, ldx, c);
  });
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
