// What the 256-bit kernels share: vectors from memory, and codes from packed planes. Each file has its own copy, so
// that none is compiled with another file's instructions.
#pragma once

#include "cpu/kernels.h"
#include "cpu/planes.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AVX2

namespace cora::cpu {

namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline __m256i broadcast4(const uint8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  return _mm256_set1_epi32(quad);
}

/// kCount of the four vectors of a quad-row's codes, eight lanes each.
template <int kBits, int kFirst = 0, int kCount = 4>
inline void load_codes(const uint8_t* packed, __m256i codes[kCount]) {
  constexpr Planes planes = planes_of(kBits);
#pragma GCC unroll 3
  for (int p = 0; p < planes.count; ++p) {
    const int width = planes.width[p], shift = planes.shift[p];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const int g = kFirst + i;
      __m256i part;
      if (width == 8) {
        part = load(packed + g * 32);
      } else if (width == 4) {
        part = _mm256_and_si256(_mm256_srli_epi16(load(packed + g % 2 * 32), g / 2 * 4), _mm256_set1_epi8(0x0f));
      } else if (width == 2) {
        const int down = 2 * g - shift;
        part = down >= 0 ? _mm256_srli_epi16(load(packed), down) : _mm256_slli_epi16(load(packed), -down);
        part = _mm256_and_si256(part, _mm256_set1_epi8(static_cast<char>(3 << shift)));
      } else {  // each byte looks at its own bit of the group's four bytes
        const __m256i which = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2,
                                               3, 3, 3, 3, 3, 3, 3, 3);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
        const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(broadcast4(packed + g * 4), which), bit);
        part = _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(static_cast<char>(1 << shift)));
      }
      codes[i] = p == 0 ? part : _mm256_or_si256(codes[i], part);
    }
    packed += kQuadRow / 8 * width;
  }
}

}  // namespace

}  // namespace cora::cpu

CORA_END_TARGET
#endif
