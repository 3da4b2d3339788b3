// Quantization and unpacking, AVX-512: 16 floats a step, masked tails; division and rounding as the
// scalar level does them, so codes agree bit for bit. Bits are spread eight codes at a time by pdep
// (one a cycle), nibbles by byte shifts.
#include "bits.h"
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

CORA_BEGIN_AVX512

namespace cora::cpu::avx512 {

namespace {

constexpr int kAhead = 256;  // elements fetched ahead of streaming stores, which the hardware does too late
constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

inline __mmask16 tail_mask(int64_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1);
}

struct Vectors {
  __m512 scale, zero_point, top;
  explicit Vectors(RunParams p)
      : scale(_mm512_set1_ps(p.scale)), zero_point(_mm512_set1_ps(p.zero_point)), top(_mm512_set1_ps(p.max_code)) {}
  /// max's second operand wins over a NaN: it becomes code 0.
  __m512 clamp(__m512 v) const { return _mm512_min_ps(_mm512_max_ps(v, _mm512_setzero_ps()), top); }
  __m512 code(__m512 x) const {
    const __m512 rounded = _mm512_roundscale_ps(_mm512_div_ps(x, scale), kNearestEven);
    return clamp(_mm512_add_ps(rounded, zero_point));
  }
};

/// Low bytes of 64 lanes, in order: packing interleaves the 128-bit quarters.
inline __m512i bytes_of(const __m512i (&q)[4]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  return _mm512_permutexvar_epi32(order, bytes);
}

/// Elements before all arrays that are not null lie on a cache line; -1 when they never do together.
inline int64_t until_aligned(const float* first, const float* second, const uint8_t* codes) {
  const auto of = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const int64_t count =
      codes != nullptr ? static_cast<int64_t>(-of(codes) % 64) : static_cast<int64_t>(-of(first) % 64 / 4);
  const bool aligned = of(first + count) % 64 == 0 && (second == nullptr || of(second + count) % 64 == 0);
  return aligned ? count : -1;
}

/// Unpacks whole octets; reads 8 bytes at a time, so it stops while those 8 are within the row.
template <int kBits>
inline int64_t unpack_octets(const uint8_t* packed, int64_t k, int64_t bytes, uint8_t* codes) {
  int64_t i = 0, at = 0;
  for (; i + 8 <= k && at + 8 <= bytes; i += 8, at += kBits) {
    uint64_t octet;
    std::memcpy(&octet, packed + at, 8);
    const uint64_t spread = _pdep_u64(octet, octet_mask(kBits));
    std::memcpy(codes + i, &spread, 8);
  }
  return i;
}

inline int64_t unpack_nibbles(const uint8_t* packed, int64_t k, uint8_t* codes) {
  const __m512i low = _mm512_set1_epi16(0x000f), high = _mm512_set1_epi16(0x0f00);
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i / 2)));
    const __m512i out =
        _mm512_or_si512(_mm512_and_si512(wide, low), _mm512_and_si512(_mm512_slli_epi16(wide, 4), high));
    _mm512_storeu_si512(codes + i, out);
  }
  return i;
}

}  // namespace

void fake_quantize(const float* x, RunParams p, int64_t count, bool stream, float* out, float* residual,
                   uint8_t* codes) {
  const Vectors v(p);
  const auto some = [&](int64_t i, __mmask16 mask) {
    const __m512 in = _mm512_maskz_loadu_ps(mask, x + i);
    const __m512 q = v.code(in);
    const __m512 y = _mm512_mul_ps(v.scale, _mm512_sub_ps(q, v.zero_point));
    _mm512_mask_storeu_ps(out + i, mask, y);
    if (residual != nullptr) _mm512_mask_storeu_ps(residual + i, mask, _mm512_sub_ps(in, y));
    if (codes != nullptr) _mm512_mask_cvtepi32_storeu_epi8(codes + i, mask, _mm512_cvtps_epi32(q));
  };
  int64_t i = 0;
  const int64_t head = stream ? until_aligned(out, residual, codes) : -1;
  if (head >= 0 && head < count) {
    for (; i + 16 <= head; i += 16) some(i, 0xffff);
    if (i < head) some(i, tail_mask(head - i));
    for (i = head; i + 64 <= count; i += 64) {
      __m512i q4[4];
      for (int j = 0; j < 4; ++j) {
        _mm_prefetch(reinterpret_cast<const char*>(x + i + 16 * j + kAhead), _MM_HINT_T0);
        const __m512 in = _mm512_loadu_ps(x + i + 16 * j);
        const __m512 q = v.code(in);
        const __m512 y = _mm512_mul_ps(v.scale, _mm512_sub_ps(q, v.zero_point));
        _mm512_stream_ps(out + i + 16 * j, y);
        if (residual != nullptr) _mm512_stream_ps(residual + i + 16 * j, _mm512_sub_ps(in, y));
        q4[j] = _mm512_cvtps_epi32(q);
      }
      if (codes != nullptr) _mm512_stream_si512(reinterpret_cast<__m512i*>(codes + i), bytes_of(q4));
    }
  }
  for (; i < count; i += 16) some(i, tail_mask(count - i));
}

double fake_quantize_backward(const float* grad, const float* x, RunParams p, int64_t count, float* grad_x) {
  const Vectors v(p);
  __m512d sum_low = _mm512_setzero_pd(), sum_high = _mm512_setzero_pd();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    const __m512 g = _mm512_maskz_loadu_ps(mask, grad + i);
    const __m512 ratio = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), v.scale);
    const __m512 rounded = _mm512_roundscale_ps(ratio, kNearestEven);
    const __m512 shifted = _mm512_add_ps(rounded, v.zero_point);
    const __mmask16 inside =
        _mm512_cmp_ps_mask(shifted, _mm512_setzero_ps(), _CMP_GE_OQ) & _mm512_cmp_ps_mask(shifted, v.top, _CMP_LE_OQ);
    _mm512_mask_storeu_ps(grad_x + i, mask, _mm512_maskz_mov_ps(inside, g));
    const __m512 slope = _mm512_mask_sub_ps(_mm512_sub_ps(v.clamp(shifted), v.zero_point), inside, rounded, ratio);
    const __m512 term = _mm512_mul_ps(g, slope);
    sum_low = _mm512_add_pd(sum_low, _mm512_cvtps_pd(_mm512_castps512_ps256(term)));
    sum_high = _mm512_add_pd(sum_high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(term, 1)));
  }
  alignas(64) double lanes[8];
  _mm512_store_pd(lanes, _mm512_add_pd(sum_low, sum_high));
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

double squared_error(const float* x, RunParams p, int64_t count) {
  const Vectors v(p);
  // A product with 1 / scale instead of the division where it can be one code off at ties only.
  const bool near = p.scale > 0x1p-100f && p.scale < 0x1p100f && std::fabs(p.zero_point) < 0x1p12f;
  const __m512 inverse = _mm512_set1_ps(1.0f / p.scale);
  const __m512 low = _mm512_set1_ps(-p.zero_point), high = _mm512_set1_ps(p.max_code - p.zero_point);
  __m512d sum_low = _mm512_setzero_pd(), sum_high = _mm512_setzero_pd();
  const auto add = [&](__m512 in, __mmask16 mask) {
    __m512 q;
    if (near)
      q = _mm512_roundscale_ps(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(in, inverse), low), high), kNearestEven);
    else
      q = _mm512_sub_ps(v.code(in), v.zero_point);
    const __m512 rest = _mm512_maskz_sub_ps(mask, in, _mm512_mul_ps(v.scale, q));
    const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(rest));
    const __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(rest, 1));
    sum_low = _mm512_fmadd_pd(first, first, sum_low);
    sum_high = _mm512_fmadd_pd(second, second, sum_high);
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) add(_mm512_loadu_ps(x + i), 0xffff);
  if (i < count) add(_mm512_maskz_loadu_ps(tail_mask(count - i), x + i), tail_mask(count - i));
  alignas(64) double lanes[8];
  _mm512_store_pd(lanes, _mm512_add_pd(sum_low, sum_high));
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

void unpack_row(const uint8_t* packed, int64_t k, int bits, uint8_t* codes) {
  const int64_t bytes = row_bytes(k, bits);
  int64_t done = 0;
  if (bits == 4) {
    done = unpack_nibbles(packed, k, codes);
  } else if (bits == 8) {
    std::memcpy(codes, packed, static_cast<size_t>(k));
    return;
  } else {
    CORA_DISPATCH_BITS(bits, [&] { done = unpack_octets<kBits>(packed, k, bytes, codes); });
  }
  // What is left starts at an octet, so at a whole byte.
  scalar::unpack_row(packed + done / 8 * bits, k - done, bits, codes + done);
}

void dequantize(const uint8_t* codes, float scale, int32_t zero_point, int64_t count, float* out) {
  const __m512 s = _mm512_set1_ps(scale);
  const __m512i z = _mm512_set1_epi32(zero_point);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    const __m512i q = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + i));
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(s, _mm512_cvtepi32_ps(_mm512_sub_epi32(q, z))));
  }
}

}  // namespace cora::cpu::avx512

CORA_END_TARGET
#endif
