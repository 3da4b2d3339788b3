// Integer products on CPUs that have vpdpbusd for 256-bit vectors but no AVX-512 (Intel's from Alder Lake on; AMD's
// Zen 5 has both). It adds four products of an unsigned and a signed byte to 32 bits, exactly for all weights, where
// AVX2 takes three instructions and has to mind how wide a weight is.
// Method: 6 x 16 pieces of the 12 x 32 tile, 12 x 8 where only so many weight rows are left: 12 sums hide the
// instruction's latency of 5 at two a cycle.
#include "bits.h"
#include "cpu/codes_avx2.h"
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#ifdef CORA_EMULATED_AVXVNNI  // the sanitized build: every CPU with AVX2 tests this level
CORA_BEGIN_AVX2
#else
CORA_BEGIN_AVXVNNI
#endif

namespace cora::cpu::avxvnni {

namespace {

/// acc + the four products of each dword.
inline __m256i add_products(__m256i acc, __m256i x, __m256i w) {
#ifdef CORA_EMULATED_AVXVNNI
  const __m256i nibble = _mm256_set1_epi8(0x0f), one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
  const __m256i low = _mm256_and_si256(x, nibble), high = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, w), one));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(high, w), sixteen));
#else
  return _mm256_dpbusd_avx_epi32(acc, x, w);
#endif
}

/// kM rows of x by 8 * kV weight rows.
template <int kM, int kV>
void tile_s8_fixed(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
                   int32_t* acc) {
  __m256i c[kM][kV];
#pragma GCC unroll 12
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) c[i][v] = _mm256_setzero_si256();
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* x[kM];
#pragma GCC unroll 12
    for (int i = 0; i < kM; ++i) x[i] = rows[i] + tap[t];
    for (int64_t k = 0; k < quads * kQuad; k += kQuad, panel += kQuadRow) {
      __m256i w[kV];
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) w[v] = load(panel + v * 32);
#pragma GCC unroll 12
      for (int i = 0; i < kM; ++i) {
        const __m256i xi = broadcast4(x[i] + k);
#pragma GCC unroll 2
        for (int v = 0; v < kV; ++v) c[i][v] = add_products(c[i][v], xi, w[v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) store(acc + i * kLanes + v * 8, c[i][v]);
}

/// kCount vectors of lanes from kFirst on.
template <int kBits, int kM, int kFirst, int kCount>
inline void gemv_s8_part(const uint8_t* packed, int64_t rows, const uint8_t* x, int64_t ldx, int32_t* acc) {
  __m256i sum[kM][kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) sum[i][v] = _mm256_setzero_si256();
  for (int64_t r = 0; r < rows; ++r, packed += quad_row_bytes(kBits)) {
    if (kFirst == 0) prefetch_packed(packed, quad_row_bytes(kBits));
    __m256i w[kCount];
    load_codes<kBits, kFirst, kCount>(packed, w);
    if (kBits == 8)
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) w[v] = _mm256_xor_si256(w[v], _mm256_set1_epi8(static_cast<char>(0x80)));
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
      const __m256i xi = broadcast4(x + i * ldx + r * kQuad);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) sum[i][v] = add_products(sum[i][v], xi, w[v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) store(acc + i * kLanes + (kFirst + v) * 8, sum[i][v]);
}

template <int kBits, int kM>
void gemv_s8_fixed(const uint8_t* packed, int64_t rows, const uint8_t* x, int64_t ldx, int32_t* acc) {
  if constexpr (kM <= 2) {
    gemv_s8_part<kBits, kM, 0, 4>(packed, rows, x, ldx, acc);
  } else {  // more sums than registers
    gemv_s8_part<kBits, kM, 0, 2>(packed, rows, x, ldx, acc);
    gemv_s8_part<kBits, kM, 2, 2>(packed, rows, x, ldx, acc);
  }
}

}  // namespace

void tile_s8(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
             int /*widest*/, int m, int /*block*/, int lanes, int32_t* acc) {
  using Tile = decltype(&tile_s8_fixed<1, 1>);
  static constexpr Tile k16[] = {tile_s8_fixed<1, 2>, tile_s8_fixed<2, 2>, tile_s8_fixed<3, 2>,
                                 tile_s8_fixed<4, 2>, tile_s8_fixed<5, 2>, tile_s8_fixed<6, 2>};
  static constexpr Tile k8[] = {tile_s8_fixed<1, 1>, tile_s8_fixed<2, 1>,  tile_s8_fixed<3, 1>,  tile_s8_fixed<4, 1>,
                                tile_s8_fixed<5, 1>, tile_s8_fixed<6, 1>,  tile_s8_fixed<7, 1>,  tile_s8_fixed<8, 1>,
                                tile_s8_fixed<9, 1>, tile_s8_fixed<10, 1>, tile_s8_fixed<11, 1>, tile_s8_fixed<12, 1>};
  for (int n = 0; n < lanes; n += 16) {
    const bool few = lanes - n <= 8;
    const int most = few ? 12 : 6;
    for (int i = 0; i < m; i += most)
      (few ? k8 : k16)[(m - i < most ? m - i : most) - 1](rows + i, tap, taps, quads, panel + n * kQuad,
                                                          acc + i * kLanes + n);
  }
}

#define CORA_GEMV(f) {f<kBits, 1>, f<kBits, 2>, f<kBits, 3>, f<kBits, 4>}

void gemv_s8(const uint8_t* packed, int bits, int64_t rows, const uint8_t* x, int64_t ldx, int m, int32_t* acc) {
  CORA_DISPATCH_BITS(bits, [&] {
    static constexpr decltype(&gemv_s8_fixed<kBits, 1>) kRows[kGemvM] = CORA_GEMV(gemv_s8_fixed);
    kRows[m - 1](packed, rows, x, ldx, acc);
  });
}

}  // namespace cora::cpu::avxvnni

CORA_END_TARGET
#endif
