// Rounding with error feedback, AVX-512: rows in the lanes. Eight columns by two vectors of rows collect what a block
// owes them. No FMA: the sums are the scalar level's.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

CORA_BEGIN_AVX512

namespace cora::cpu::avx512 {

namespace {

constexpr int kVector = 16;

/// w - e * u, rounded twice.
inline __m512 less(__m512 w, __m512 e, __m512 u) { return _mm512_sub_ps(w, _mm512_mul_ps(e, u)); }

/// kColumns columns at w, u by two vectors of rows, all `width` errors.
template <int kColumns>
inline void owe(float* w, const float* u, int64_t ldu, int width, const float* e) {
  __m512 sum[kColumns][2];
  for (int j = 0; j < kColumns; ++j)
    for (int v = 0; v < 2; ++v) sum[j][v] = _mm512_loadu_ps(w + j * kFeedbackRows + v * kVector);
  for (int k = 0; k < width; ++k) {
    const __m512 error[2] = {_mm512_loadu_ps(e + k * kFeedbackRows), _mm512_loadu_ps(e + k * kFeedbackRows + kVector)};
    for (int j = 0; j < kColumns; ++j) {
      const __m512 factor = _mm512_set1_ps(u[k * ldu + j]);
      for (int v = 0; v < 2; ++v) sum[j][v] = less(sum[j][v], error[v], factor);
    }
  }
  for (int j = 0; j < kColumns; ++j)
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(w + j * kFeedbackRows + v * kVector, sum[j][v]);
}

}  // namespace

void feedback(float* w, int rows, const float* u, int64_t ldu, int width, int64_t rest, const float* scale,
              const float* zero_point, float top, float* q, float* e) {
  for (int k = 0; k < width; ++k) {
    const __m512 diagonal = _mm512_set1_ps(u[k * ldu + k]);
    for (int r = 0; r < rows; r += kVector) {
      const int at = k * kFeedbackRows + r;
      const __m512 x = _mm512_loadu_ps(w + at), s = _mm512_loadu_ps(scale + at), z = _mm512_loadu_ps(zero_point + at);
      __m512 code = _mm512_roundscale_ps(_mm512_div_ps(x, s), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      // A NaN becomes code 0: max and min give their second operand.
      code = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(code, z), _mm512_setzero_ps()), _mm512_set1_ps(top));
      const __m512 error = _mm512_div_ps(less(x, s, _mm512_sub_ps(code, z)), diagonal);
      _mm512_storeu_ps(q + at, code);
      _mm512_storeu_ps(e + at, error);
      for (int j = k + 1; j < width; ++j) {
        float* to = w + j * kFeedbackRows + r;
        _mm512_storeu_ps(to, less(_mm512_loadu_ps(to), error, _mm512_set1_ps(u[k * ldu + j])));
      }
    }
  }
  // A cache line of each line of the factor, side by side: where they are, all may fall into one set of the cache.
  constexpr int kTile = 16, kColumns = 8;
  float tile[kFeedbackBlock * kTile];
  int64_t j = width;
  for (; j + kTile <= width + rest; j += kTile) {
    for (int k = 0; k < width; ++k) {
      _mm512_storeu_ps(tile + k * kTile, _mm512_loadu_ps(u + k * ldu + j));
      _mm_prefetch(reinterpret_cast<const char*>(u + k * ldu + j + 2 * kTile), _MM_HINT_T0);
    }
    for (int r = 0; r < rows; r += 2 * kVector)
      for (int i = 0; i < kTile; i += kColumns)
        owe<kColumns>(w + (j + i) * kFeedbackRows + r, tile + i, kTile, width, e + r);
  }
  for (; j < width + rest; ++j)
    for (int r = 0; r < rows; r += 2 * kVector) owe<1>(w + j * kFeedbackRows + r, u + j, ldu, width, e + r);
}

}  // namespace cora::cpu::avx512

CORA_END_TARGET
#endif
