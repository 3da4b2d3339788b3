// The layer kernels, AVX2 + FMA.
// Method: the 12 x 32 tile is done in pieces of 6 x 16 (8 weight rows where only so many are left): 12 sums, two
// panel vectors, one broadcast. vpmaddubsw adds two products of an unsigned and a signed byte into 16 bits. Up to
// weights of 32 several such sums fit 16 bits, which spares most of the widening additions; up to 64 one does, and is
// widened in a piece of 4 x 16; wider ones are taken by halves of four bits.
#include "bits.h"
#include "cpu/codes_avx2.h"
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

CORA_BEGIN_AVX2

namespace cora::cpu::avx2 {

namespace {

inline int32_t sum_epi32(__m256i v) {
  const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i pair = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
}

inline __m256i add_pairs(__m256i acc, __m256i x, __m256i w) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
}
/// acc + the four products of each dword; kWide: |w| may be above 64.
template <bool kWide>
inline __m256i add_products(__m256i acc, __m256i x, __m256i w) {
  if (!kWide) return add_pairs(acc, x, w);
  const __m256i bit7 = _mm256_set1_epi8(static_cast<char>(0x80));  // 2 * 128 * -128 just fits 16 bits
  return add_pairs(add_pairs(acc, _mm256_andnot_si256(bit7, x), w), _mm256_and_si256(bit7, x), w);
}

template <int kBits>
void expand_fixed(const uint8_t* packed, int64_t rows, const uint8_t* offset, int8_t* panel) {
  __m256i o[4];
  for (int g = 0; g < 4; ++g)
    o[g] = _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(offset + g * 8))),
                              _mm256_set1_epi32(0x01010101));
  for (int64_t r = 0; r < rows; ++r, packed += quad_row_bytes(kBits), panel += kQuadRow) {
    __m256i codes[4];
    prefetch_packed<kPanelAhead>(packed, quad_row_bytes(kBits));
    load_codes<kBits>(packed, codes);
    for (int g = 0; g < 4; ++g) store(panel + g * 32, _mm256_sub_epi8(codes[g], o[g]));
  }
}

/// Sums of products of an unsigned byte and one of at most `widest`, two at a time, that fit 16 bits.
constexpr int64_t sums_in_16_bits(int widest) { return 32767 / (2 * 255 * widest); }

// Every loop over a tile's sums is unrolled: one that is not puts the array into memory, and each sum is then
// stored as soon as it is made.

/// sum + x * w in 16 bits. The empty asm keeps the order: g++ would sum the products of an unrolled loop as a tree,
/// with far more leaves than registers.
inline __m256i add_narrow(__m256i sum, __m256i x, __m256i w) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, w));
  asm("" : "+x"(sum));
  return sum;
}

/// acc += the sums of pairs of `sum`, times `factor`.
inline void widen(int32_t* acc, __m256i sum, int16_t factor) {
  store(acc, _mm256_add_epi32(load(acc), _mm256_madd_epi16(sum, _mm256_set1_epi16(factor))));
}

/// acc += kQuads quad-rows' products, summed in 16 bits. All registers hold sums: acc stays in memory, which costs
/// less than a narrower tile, whose weights are loaded twice as often.
template <int kM, int kV, int kQuads>
inline void add_narrow_quads(const uint8_t* const (&x)[kM], int64_t k, const int8_t* panel, int32_t* acc) {
  __m256i sum[kM][kV];
#pragma GCC unroll 8
  for (int q = 0; q < kQuads; ++q) {
    __m256i w[kV];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) w[v] = load(panel + q * kQuadRow + v * 32);
#pragma GCC unroll 6
    for (int i = 0; i < kM; ++i) {
      const __m256i xi = broadcast4(x[i] + k + q * kQuad);
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) sum[i][v] = q > 0 ? add_narrow(sum[i][v], xi, w[v]) : _mm256_maddubs_epi16(xi, w[v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) widen(acc + i * kLanes + v * 8, sum[i][v], 1);
}

/// What is left of a run, fewer quad-rows than 2 * kQuads.
template <int kM, int kV, int kQuads>
inline void add_narrow_rest(const uint8_t* const (&x)[kM], int64_t k, int64_t left, const int8_t* panel, int32_t* acc) {
  if constexpr (kQuads > 0) {
    const bool some = (left & kQuads) != 0;
    if (some) add_narrow_quads<kM, kV, kQuads>(x, k, panel, acc);
    add_narrow_rest<kM, kV, kQuads / 2>(x, some ? k + kQuads * kQuad : k, left,
                                        some ? panel + kQuads * kQuadRow : panel, acc);
  }
}

/// kM rows of x by 8 * kV weight rows of which kQuads quad-rows' sums fit 16 bits.
template <int kM, int kV, int kQuads>
void tile_s8_narrow(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
                    int32_t* acc) {
  for (int i = 0; i < kM; ++i)
    for (int v = 0; v < kV; ++v) store(acc + i * kLanes + v * 8, _mm256_setzero_si256());
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* x[kM];
#pragma GCC unroll 6
    for (int i = 0; i < kM; ++i) x[i] = rows[i] + tap[t];
    int64_t q = 0;
    for (; q + kQuads <= quads; q += kQuads, panel += kQuads * kQuadRow)
      add_narrow_quads<kM, kV, kQuads>(x, q * kQuad, panel, acc);
    add_narrow_rest<kM, kV, (kQuads > 4 ? 4 : kQuads / 2)>(x, q * kQuad, quads - q, panel, acc);
    panel += (quads - q) * kQuadRow;
  }
}

/// kM rows of x by 8 * kV weight rows, none above 64: one sum of two fits 16 bits.
template <int kM, int kV>
void tile_s8_medium(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
                    int32_t* acc) {
  __m256i c[kM][kV];
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) c[i][v] = _mm256_setzero_si256();
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* x[kM];
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) x[i] = rows[i] + tap[t];
    for (int64_t k = 0; k < quads * kQuad; k += kQuad, panel += kQuadRow) {
      __m256i w[kV];
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) w[v] = load(panel + v * 32);
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i) {
        const __m256i xi = broadcast4(x[i] + k);
#pragma GCC unroll 2
        for (int v = 0; v < kV; ++v) c[i][v] = add_pairs(c[i][v], xi, w[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) store(acc + i * kLanes + v * 8, c[i][v]);
}

/// acc += kQuads quad-rows' products with weights of any size, as 16 * high + low with low in 0..15 and high in -8..7.
template <int kM, int kQuads>
inline void add_wide_quads(const uint8_t* const (&x)[kM], int64_t k, const int8_t* panel, int32_t* acc) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  const __m256i sign = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7,
                                        -8, -7, -6, -5, -4, -3, -2, -1);
  __m256i low[kM], high[kM];
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) {
    const __m256i w = load(panel + q * kQuadRow), wl = _mm256_and_si256(w, nibble);
    const __m256i wh = _mm256_shuffle_epi8(sign, _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble));
#pragma GCC unroll 6
    for (int i = 0; i < kM; ++i) {
      const __m256i xi = broadcast4(x[i] + k + q * kQuad);
      low[i] = q > 0 ? add_narrow(low[i], xi, wl) : _mm256_maddubs_epi16(xi, wl);
      high[i] = q > 0 ? add_narrow(high[i], xi, wh) : _mm256_maddubs_epi16(xi, wh);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) {
    widen(acc + i * kLanes, low[i], 1);
    widen(acc + i * kLanes, high[i], 16);
  }
}

/// kM rows of x by 8 weight rows of any size.
template <int kM>
void tile_s8_wide(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
                  int32_t* acc) {
  constexpr int64_t kQuads = sums_in_16_bits(15);
  for (int i = 0; i < kM; ++i) store(acc + i * kLanes, _mm256_setzero_si256());
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* x[kM];
#pragma GCC unroll 6
    for (int i = 0; i < kM; ++i) x[i] = rows[i] + tap[t];
    int64_t q = 0;
    for (; q + kQuads <= quads; q += kQuads, panel += kQuads * kQuadRow)
      add_wide_quads<kM, kQuads>(x, q * kQuad, panel, acc);
    for (; q < quads; ++q, panel += kQuadRow) add_wide_quads<kM, 1>(x, q * kQuad, panel, acc);
  }
}

using TileS8 = decltype(&tile_s8_wide<1>);
/// [lanes: 8, 16][rows - 1]
template <int kQuads>
constexpr TileS8 kNarrow[2][6] = {
    {tile_s8_narrow<1, 1, kQuads>, tile_s8_narrow<2, 1, kQuads>, tile_s8_narrow<3, 1, kQuads>,
     tile_s8_narrow<4, 1, kQuads>, tile_s8_narrow<5, 1, kQuads>, tile_s8_narrow<6, 1, kQuads>},
    {tile_s8_narrow<1, 2, kQuads>, tile_s8_narrow<2, 2, kQuads>, tile_s8_narrow<3, 2, kQuads>,
     tile_s8_narrow<4, 2, kQuads>, tile_s8_narrow<5, 2, kQuads>, tile_s8_narrow<6, 2, kQuads>}};

template <int kM, int kV>
void tile_f32_fixed(const float* const* rows, const int64_t* tap, int64_t taps, int64_t run, const float* panel,
                    float* acc) {
  __m256 c[kM][kV];
#pragma GCC unroll 12
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) c[i][v] = _mm256_loadu_ps(acc + i * kLanes + v * 8);
  for (int64_t t = 0; t < taps; ++t) {
    const float* x[kM];
#pragma GCC unroll 12
    for (int i = 0; i < kM; ++i) x[i] = rows[i] + tap[t];
    for (int64_t k = 0; k < run; ++k, panel += kLanes) {
      __m256 w[kV];
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) w[v] = _mm256_loadu_ps(panel + v * 8);
#pragma GCC unroll 12
      for (int i = 0; i < kM; ++i) {
        const __m256 xi = _mm256_broadcast_ss(x[i] + k);
#pragma GCC unroll 2
        for (int v = 0; v < kV; ++v) c[i][v] = _mm256_fmadd_ps(xi, w[v], c[i][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) _mm256_storeu_ps(acc + i * kLanes + v * 8, c[i][v]);
}

/// Adds kRows quad-rows of codes of up to four bits by kM rows of x, summed in 16 bits first, in kCount vectors of
/// lanes from kFirst on. One row's totals are in registers, and a tree of its sums fits them: a block is done before a
/// store of the last one would have come back. More rows take longer than that, and all registers.
template <int kBits, int kM, int kFirst, int kCount, int kRows>
inline void gemv_s8_rows(const uint8_t* packed, const uint8_t* x, int64_t ldx, __m256i (&total)[kCount], int32_t* acc) {
  __m256i sum[kM][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    __m256i w[kCount];
    load_codes<kBits, kFirst, kCount>(packed + r * quad_row_bytes(kBits), w);
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
      const __m256i xi = broadcast4(x + i * ldx + r * kQuad);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v)
        if (r == 0)
          sum[i][v] = _mm256_maddubs_epi16(xi, w[v]);
        else if (kM == 1)
          sum[i][v] = _mm256_add_epi16(sum[i][v], _mm256_maddubs_epi16(xi, w[v]));
        else
          sum[i][v] = add_narrow(sum[i][v], xi, w[v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
      if (kM == 1)
        total[v] = _mm256_add_epi32(total[v], _mm256_madd_epi16(sum[i][v], _mm256_set1_epi16(1)));
      else
        widen(acc + i * kLanes + (kFirst + v) * 8, sum[i][v], 1);
}

template <int kBits, int kM, int kFirst, int kCount>
inline void gemv_s8_narrow(const uint8_t* packed, int64_t rows, const uint8_t* x, int64_t ldx, int32_t* acc) {
  constexpr int64_t most = sums_in_16_bits((1 << kBits) - 1), kRows = most < 8 ? most : 8;
  __m256i total[kCount];
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    total[v] = _mm256_setzero_si256();
    for (int i = 0; i < kM; ++i) store(acc + i * kLanes + (kFirst + v) * 8, total[v]);
  }
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    const uint8_t* const from = packed + r * quad_row_bytes(kBits);
    if (kFirst == 0) prefetch_packed(from, kRows * quad_row_bytes(kBits));
    gemv_s8_rows<kBits, kM, kFirst, kCount, kRows>(from, x + r * kQuad, ldx, total, acc);
  }
  for (; r < rows; ++r)
    gemv_s8_rows<kBits, kM, kFirst, kCount, 1>(packed + r * quad_row_bytes(kBits), x + r * kQuad, ldx, total, acc);
  if (kM == 1)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) store(acc + (kFirst + v) * 8, total[v]);
}

template <int kBits, int kM>
void gemv_s8_fixed(const uint8_t* packed, int64_t rows, const uint8_t* x, int64_t ldx, int32_t* acc) {
  if constexpr (kBits <= 4 && kM <= 2) {
    gemv_s8_narrow<kBits, kM, 0, 4>(packed, rows, x, ldx, acc);
    return;
  } else if constexpr (kBits <= 4) {  // more sums than registers
    gemv_s8_narrow<kBits, kM, 0, 2>(packed, rows, x, ldx, acc);
    gemv_s8_narrow<kBits, kM, 2, 2>(packed, rows, x, ldx, acc);
    return;
  }
  __m256i sum[kM][4];
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sum[i][g] = _mm256_setzero_si256();
  for (int64_t r = 0; r < rows; ++r, packed += quad_row_bytes(kBits)) {
    prefetch_packed(packed, quad_row_bytes(kBits));
    __m256i w[4];
    load_codes<kBits>(packed, w);
    if (kBits == 8)
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) w[g] = _mm256_xor_si256(w[g], _mm256_set1_epi8(static_cast<char>(0x80)));
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
      const __m256i xi = broadcast4(x + i * ldx + r * kQuad);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) sum[i][g] = add_products<(kBits > 6)>(sum[i][g], xi, w[g]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) store(acc + i * kLanes + g * 8, sum[i][g]);
}

/// The lanes of kCount vectors from kFirst on.
template <int kBits, int kM, int kFirst, int kCount>
inline void gemv_f32_part(const uint8_t* packed, int64_t rows, const float* zero_point, const float* x, int64_t ldx,
                          float* c) {
  const __m256i byte = _mm256_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12);  // of each lane's dword, and zeros
  const __m256i first = _mm256_or_si256(byte, _mm256_set1_epi32(static_cast<int32_t>(0x80808000)));
  __m256 sum[kM][kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) sum[i][g] = _mm256_setzero_ps();
  for (int64_t r = 0; r < rows; ++r, packed += quad_row_bytes(kBits)) {
    if (kFirst == 0) prefetch_packed(packed, quad_row_bytes(kBits));
    __m256i w[kCount];
    load_codes<kBits, kFirst, kCount>(packed, w);
#pragma GCC unroll 4
    for (int j = 0; j < kQuad; ++j)
#pragma GCC unroll 4
      for (int g = 0; g < kCount; ++g) {
        const __m256i at = _mm256_add_epi8(first, _mm256_set1_epi32(j));
        const __m256 code = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(w[g], at));
        const __m256 exact = _mm256_sub_ps(code, _mm256_loadu_ps(zero_point + (kFirst + g) * 8));
#pragma GCC unroll 4
        for (int i = 0; i < kM; ++i)
          sum[i][g] = _mm256_fmadd_ps(exact, _mm256_broadcast_ss(x + i * ldx + r * kQuad + j), sum[i][g]);
      }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) _mm256_storeu_ps(c + i * kLanes + (kFirst + g) * 8, sum[i][g]);
}

template <int kBits, int kM>
void gemv_f32_fixed(const uint8_t* packed, int64_t rows, const float* zero_point, const float* x, int64_t ldx,
                    float* c) {
  if constexpr (kM <= 2) {
    gemv_f32_part<kBits, kM, 0, 4>(packed, rows, zero_point, x, ldx, c);
  } else {  // more sums than registers
    gemv_f32_part<kBits, kM, 0, 2>(packed, rows, zero_point, x, ldx, c);
    gemv_f32_part<kBits, kM, 2, 2>(packed, rows, zero_point, x, ldx, c);
  }
}

}  // namespace

void expand(const uint8_t* packed, int bits, int64_t rows, const uint8_t* offset, int8_t* panel) {
  CORA_DISPATCH_BITS(bits, [&] { expand_fixed<kBits>(packed, rows, offset, panel); });
}

void panel_f32(const int8_t* panel, int64_t rows, const float* scale, const int32_t* far, float* out) {
  for (int64_t r = 0; r < rows; ++r, panel += kQuadRow, out += kQuad * kLanes)
    for (int n = 0; n < kLanes; n += 8) {
      const __m256 s = _mm256_loadu_ps(scale + n);
      const __m256i f = load(far + n), quad = load(panel + n * kQuad);
      for (int i = 0; i < kQuad; ++i) {
        const __m256i w = _mm256_srai_epi32(_mm256_slli_epi32(quad, 24 - 8 * i), 24);
        _mm256_storeu_ps(out + i * kLanes + n, _mm256_mul_ps(s, _mm256_cvtepi32_ps(_mm256_sub_epi32(w, f))));
      }
    }
}

void tile_s8(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
             int widest, int m, int /*block*/, int lanes, int32_t* acc) {
  static constexpr TileS8 kMedium16[] = {tile_s8_medium<1, 2>, tile_s8_medium<2, 2>, tile_s8_medium<3, 2>,
                                         tile_s8_medium<4, 2>};
  static constexpr TileS8 kMedium8[] = {tile_s8_medium<1, 1>, tile_s8_medium<2, 1>, tile_s8_medium<3, 1>,
                                        tile_s8_medium<4, 1>, tile_s8_medium<5, 1>, tile_s8_medium<6, 1>};
  static constexpr TileS8 kWide8[] = {tile_s8_wide<1>, tile_s8_wide<2>, tile_s8_wide<3>,
                                      tile_s8_wide<4>, tile_s8_wide<5>, tile_s8_wide<6>};
  const int64_t sums = sums_in_16_bits(widest);
  for (int n = 0; n < lanes;) {
    const bool few = sums == 0 || lanes - n <= 8;
    const TileS8* tiles = few ? kMedium8 : kMedium16;
    if (sums >= 2)
      tiles = (sums >= 8 ? kNarrow<8> : sums >= 6 ? kNarrow<6> : sums >= 4 ? kNarrow<4> : kNarrow<2>)[few ? 0 : 1];
    if (sums == 0) tiles = kWide8;
    const int most = sums == 1 && !few ? 4 : 6;
    for (int i = 0; i < m; i += most)
      tiles[(m - i < most ? m - i : most) - 1](rows + i, tap, taps, quads, panel + n * kQuad, acc + i * kLanes + n);
    n += few ? 8 : 16;
  }
}

void tile_f32(const float* const* rows, const int64_t* tap, int64_t taps, int64_t run, const float* panel, int m,
              int lanes, float* c) {
  using Tile = decltype(&tile_f32_fixed<1, 1>);
  static constexpr Tile k16[] = {tile_f32_fixed<1, 2>, tile_f32_fixed<2, 2>, tile_f32_fixed<3, 2>,
                                 tile_f32_fixed<4, 2>, tile_f32_fixed<5, 2>, tile_f32_fixed<6, 2>};
  static constexpr Tile k8[] = {tile_f32_fixed<1, 1>,  tile_f32_fixed<2, 1>,  tile_f32_fixed<3, 1>,
                                tile_f32_fixed<4, 1>,  tile_f32_fixed<5, 1>,  tile_f32_fixed<6, 1>,
                                tile_f32_fixed<7, 1>,  tile_f32_fixed<8, 1>,  tile_f32_fixed<9, 1>,
                                tile_f32_fixed<10, 1>, tile_f32_fixed<11, 1>, tile_f32_fixed<12, 1>};
  for (int n = 0; n < lanes; n += 16) {
    const bool few = lanes - n <= 8;
    const int most = few ? 12 : 6;
    for (int i = 0; i < m; i += most)
      (few ? k8 : k16)[(m - i < most ? m - i : most) - 1](rows + i, tap, taps, run, panel + n, c + i * kLanes + n);
  }
}

void row_sums(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t run, int m, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi8(1);
  for (int i = 0; i < m; ++i) {
    __m256i sum = _mm256_setzero_si256();
    int32_t rest = 0;
    for (int64_t t = 0; t < taps; ++t) {
      const uint8_t* x = rows[i] + tap[t];
      int64_t k = 0;
      for (; k + 32 <= run; k += 32) sum = add_pairs(sum, load(x + k), ones);
      for (; k < run; ++k) rest += x[k];
    }
    sums[i] = sum_epi32(sum) + rest;
  }
}

#define CORA_GEMV(f) {f<kBits, 1>, f<kBits, 2>, f<kBits, 3>, f<kBits, 4>}

void gemv_s8(const uint8_t* packed, int bits, int64_t rows, const uint8_t* x, int64_t ldx, int m, int32_t* acc) {
  CORA_DISPATCH_BITS(bits, [&] {
    static constexpr decltype(&gemv_s8_fixed<kBits, 1>) kRows[kGemvM] = CORA_GEMV(gemv_s8_fixed);
    kRows[m - 1](packed, rows, x, ldx, acc);
  });
}

void gemv_f32(const uint8_t* packed, int bits, int64_t rows, const float* zero_point, const float* x, int64_t ldx,
              int m, float* c) {
  CORA_DISPATCH_BITS(bits, [&] {
    static constexpr decltype(&gemv_f32_fixed<kBits, 1>) kRows[kGemvM] = CORA_GEMV(gemv_f32_fixed);
    kRows[m - 1](packed, rows, zero_point, x, ldx, c);
  });
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
