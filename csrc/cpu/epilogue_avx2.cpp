// What follows a tile's product, AVX2 + FMA: the adapter's second half, and the epilogue on 16 lanes at once.
#include "cpu/codes_avx2.h"
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AVX2

namespace cora::cpu::avx2 {

namespace {

inline __m256i lane_mask(int lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

template <int kM>
void up_rows(const float* hidden, int64_t rank, const float* b, float* up) {
  __m256 sum[kM][4];
#pragma GCC unroll 3
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sum[i][g] = _mm256_setzero_ps();
  for (int64_t j = 0; j < rank; ++j, b += kLanes) {
    __m256 u[kM];
#pragma GCC unroll 3
    for (int i = 0; i < kM; ++i)
      u[i] = _mm256_broadcast_ss(hidden + i * kLanes + j / kLanes * kHiddenChunk + j % kLanes);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const __m256 w = _mm256_loadu_ps(b + g * 8);
#pragma GCC unroll 3
      for (int i = 0; i < kM; ++i) sum[i][g] = _mm256_fmadd_ps(u[i], w, sum[i][g]);
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) _mm256_storeu_ps(up + i * kLanes + g * 8, sum[i][g]);
}

// Masked moves and calls of memcpy only where a vector is not whole: they take many times as long.
inline __m256 load_floats(const float* from, int count) {
  return count == 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, lane_mask(count));
}
inline void store_floats(float* to, int count, __m256 v) {
  count == 8 ? _mm256_storeu_ps(to, v) : _mm256_maskstore_ps(to, lane_mask(count), v);
}
inline __m256i load_bytes(const uint8_t* from, int count) {
  if (count == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  int64_t bytes = 0;
  std::memcpy(&bytes, from, static_cast<size_t>(count));
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
}
/// Integers as bytes from 0 to 255: of one vector, `count` of them, or of two.
inline void store_codes(uint8_t* to, int count, const __m256i (&code)[1]) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code[0]), _mm256_extracti128_si256(code[0], 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  if (count == 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
  const int64_t some = _mm_cvtsi128_si64(bytes);
  std::memcpy(to, &some, static_cast<size_t>(count));
}
inline void store_codes(uint8_t* to, int /*count*/, const __m256i (&code)[2]) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(code[0], code[1]), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}

/// 8 * kV lanes from n on, the last vector's `count` of them.
template <int kV>
void epilogue_lanes(const Epilogue& e, int m, int n, int count, const int64_t* at, const int64_t* add_at) {
  const __m256 low = _mm256_set1_ps(e.codes ? e.code_low : e.low);
  const __m256 high = _mm256_set1_ps(e.codes ? e.code_high : e.high);
  const __m256 inverse_scale = _mm256_set1_ps(e.inverse_scale);
  const __m256i zero_point = _mm256_set1_epi32(e.zero_point);
  __m256i correction[kV];
  __m256 bias[kV], factor[kV];
  for (int v = 0; v < kV; ++v) {
    const int k = n + v * 8;
    correction[v] = e.acc != nullptr ? load(e.correction + k) : _mm256_setzero_si256();
    bias[v] = e.bias != nullptr ? _mm256_loadu_ps(e.bias + k) : _mm256_setzero_ps();
    factor[v] = e.alpha != nullptr ? _mm256_loadu_ps(e.alpha + k) : _mm256_set1_ps(1.0f);
  }
  for (int i = 0; i < m; ++i) {
    if (at[i] < 0) continue;
    const int k = i * kLanes + n;
    __m256 value[kV];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
      value[v] = e.acc != nullptr ? _mm256_cvtepi32_ps(_mm256_sub_epi32(load(e.acc + k + v * 8), correction[v]))
                                  : _mm256_loadu_ps(e.c + k + v * 8);
      if (e.row_scale != nullptr) factor[v] = _mm256_set1_ps(e.row_scale[i]);
      value[v] = _mm256_fmadd_ps(value[v], factor[v], bias[v]);
    }
    if (e.u != nullptr)
      for (int64_t j = 0; j < e.rank; ++j) {
        const __m256 u = _mm256_broadcast_ss(e.u + i * kLanes + j);
#pragma GCC unroll 2
        for (int v = 0; v < kV; ++v)
          value[v] = _mm256_fmadd_ps(u, _mm256_loadu_ps(e.b + j * kLanes + n + v * 8), value[v]);
      }
    if (e.up != nullptr)
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) value[v] = _mm256_add_ps(value[v], _mm256_loadu_ps(e.up + k + v * 8));
    if (e.add != nullptr && e.add_codes) {
      const uint8_t* const from = static_cast<const uint8_t*>(e.add) + add_at[i] + n;
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) {
        const __m256 a = _mm256_sub_ps(_mm256_cvtepi32_ps(load_bytes(from + v * 8, count)), _mm256_set1_ps(e.add_zero));
        value[v] = _mm256_fmadd_ps(a, _mm256_set1_ps(e.add_scale), value[v]);
      }
    } else if (e.add != nullptr) {
      const float* const from = static_cast<const float*>(e.add) + add_at[i] + n;
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) value[v] = _mm256_add_ps(value[v], load_floats(from + v * 8, count));
    }
    if (!e.codes) {
      float* const to = static_cast<float*>(e.y) + at[i] + n;
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v)  // a NaN in the second operand stays
        store_floats(to + v * 8, count, _mm256_min_ps(high, _mm256_max_ps(low, value[v])));
      continue;
    }
    __m256i code[kV];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
      const __m256 bounded = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(value[v], inverse_scale), low), high);
      code[v] = _mm256_add_epi32(_mm256_cvtps_epi32(bounded), zero_point);
    }
    store_codes(static_cast<uint8_t*>(e.y) + at[i] + n, count, code);
  }
}

}  // namespace

void requantize(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* far,
                const int32_t* xsum, const float* scale, bool add, float* c) {
  for (int n = 0; n < kLanes; n += 8) {
    const __m256i ws = load(wsum + n), f = load(far + n);
    const __m256 s = _mm256_loadu_ps(scale + n);
    for (int i = 0; i < m; ++i) {
      __m256i sum = load(acc + i * kLanes + n);
      sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(ws, _mm256_set1_epi32(zx[i])));
      sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(f, _mm256_set1_epi32(xsum[i])));
      float* to = c + i * kLanes + n;
      const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), s);
      _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), value) : value);
    }
  }
}

void store_hidden(const float* c, int m, int /*ranks*/, void* u) {
  std::memcpy(u, c, static_cast<size_t>(m) * kLanes * sizeof(float));
}

void quantized_hidden(const int32_t* acc, const int32_t* correction, const float* alpha, int m, int /*ranks*/,
                      void* u) {
  float* out = static_cast<float*>(u);
  for (int n = 0; n < kLanes; n += 8) {
    const __m256i c = load(correction + n);
    const __m256 a = _mm256_loadu_ps(alpha + n);
    for (int k = n; k < m * kLanes; k += kLanes)
      _mm256_storeu_ps(out + k, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(load(acc + k), c)), a));
  }
}

void expand_up(const int8_t* b, int64_t rank, void* out) {
  float* to = static_cast<float*>(out);
  for (int64_t i = 0; i < rank * kLanes; i += 8)
    _mm256_storeu_ps(
        to + i, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + i)))));
}

void up_project(const void* u, int m, int /*block*/, int64_t rank, const void* b, float* up) {
  const float *const hidden = static_cast<const float*>(u), *const weights = static_cast<const float*>(b);
  int i = 0;
  for (; i + 3 <= m; i += 3) up_rows<3>(hidden + i * kLanes, rank, weights, up + i * kLanes);
  for (; i < m; ++i) up_rows<1>(hidden + i * kLanes, rank, weights, up + i * kLanes);
}

void epilogue(const Epilogue& given, int m, int lanes, const int64_t* at, const int64_t* add_at) {
  const Epilogue e = given;  // a copy: what is stored cannot change it
  int n = 0;
  for (; n + 16 <= lanes; n += 16) epilogue_lanes<2>(e, m, n, 8, at, add_at);
  for (; n < lanes; n += 8) epilogue_lanes<1>(e, m, n, lanes - n < 8 ? lanes - n : 8, at, add_at);
}

}  // namespace cora::cpu::avx2

CORA_END_TARGET
#endif
