// What the 512-bit kernels share: codes from packed planes. Each file has its own copy, so that none is compiled with
// another file's instructions.
#pragma once

#include "cpu/kernels.h"
#include "cpu/planes.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AVX512

namespace cora::cpu {

namespace {

/// The two vectors of a quad-row's codes: lanes 0..15 and 16..31.
template <int kBits>
inline void load_codes(const uint8_t* packed, __m512i codes[2]) {
  constexpr Planes planes = planes_of(kBits);
#pragma GCC unroll 3
  for (int p = 0; p < planes.count; ++p) {
    const int width = planes.width[p], shift = planes.shift[p];
    __m512i part[2];
    if (width == 8) {
      part[0] = _mm512_loadu_si512(packed);
      part[1] = _mm512_loadu_si512(packed + 64);
      packed += 128;
    } else if (width == 4) {
      const __m512i mask = _mm512_set1_epi8(0x0f), v = _mm512_loadu_si512(packed);
      part[0] = _mm512_and_si512(v, mask);
      part[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
      packed += 64;
    } else if (width == 2) {
      const __m512i mask = _mm512_set1_epi8(3);
      const __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
      const __m512i low = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
      part[0] = _mm512_and_si512(_mm512_srlv_epi16(v, low), mask);
      part[1] = _mm512_and_si512(_mm512_srlv_epi16(v, _mm512_add_epi16(low, _mm512_set1_epi16(4))), mask);
      packed += 32;
    } else {
      uint64_t bits[2];
      std::memcpy(bits, packed, 16);
      const __m512i one = _mm512_set1_epi8(static_cast<char>(1 << shift));
      for (int h = 0; h < 2; ++h) codes[h] = _mm512_or_si512(codes[h], _mm512_maskz_mov_epi8(bits[h], one));
      return;  // the narrowest plane is the last
    }
    for (int h = 0; h < 2; ++h)
      codes[h] = p == 0 ? part[h] : _mm512_or_si512(codes[h], _mm512_slli_epi16(part[h], shift));
  }
}

/// Packed quad-rows -> weights: codes less their lane's offset.
template <int kBits>
struct Expander {
  __m512i offset[2];

  explicit Expander(const uint8_t* lanes) {  // each to the four bytes of its dword
    for (int h = 0; h < 2; ++h) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes + 16 * h));
      offset[h] = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(0x01010101));
    }
  }
  __attribute__((always_inline)) void quad_row(const uint8_t* packed, int8_t* weights) const {
    __m512i codes[2];
    load_codes<kBits>(packed, codes);
    for (int h = 0; h < 2; ++h) _mm512_storeu_si512(weights + 64 * h, _mm512_sub_epi8(codes[h], offset[h]));
  }
};

}  // namespace

}  // namespace cora::cpu

CORA_END_TARGET
#endif
