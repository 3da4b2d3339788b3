// Quantization, packing and unpacking, AVX2 + BMI2: 8 floats a step, scalar tails; the same rounding
// and comparisons as the scalar level. Bits are spread and gathered eight codes at a time (pdep, pext).
#include "bits.h"
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AVX2

namespace cora::cpu::avx2 {

namespace {

constexpr int kAhead = 256;  // elements fetched ahead of streaming stores, which the hardware does too late

struct Vectors {
  __m256 scale, zero_point, top;
  explicit Vectors(RunParams p)
      : scale(_mm256_set1_ps(p.scale)), zero_point(_mm256_set1_ps(p.zero_point)), top(_mm256_set1_ps(p.max_code)) {}
  static __m256 round(__m256 v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  /// max's second operand wins over a NaN: it becomes code 0.
  __m256 clamp(__m256 v) const { return _mm256_min_ps(_mm256_max_ps(v, _mm256_setzero_ps()), top); }
  __m256 code(__m256 x) const { return clamp(_mm256_add_ps(round(_mm256_div_ps(x, scale)), zero_point)); }
};

/// Eight int32 in -128..255 to their low bytes.
inline void store_bytes(__m256i v, void* to) {
  const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xff));
  const __m256i words = _mm256_packus_epi32(low, low);  // halves 0 and 1 stay in their lanes
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const int32_t first = _mm256_extract_epi32(bytes, 0), second = _mm256_extract_epi32(bytes, 4);
  std::memcpy(to, &first, 4);
  std::memcpy(static_cast<char*>(to) + 4, &second, 4);
}

/// Low bytes of 32 lanes, in order: packing interleaves the 128-bit halves.
inline __m256i bytes_of(const __m256i (&q)[4]) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/// Elements before all arrays that are not null lie on a vector's boundary; -1 when they never do together.
inline int64_t until_aligned(const float* first, const float* second, const uint8_t* codes) {
  const auto of = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const int64_t count =
      codes != nullptr ? static_cast<int64_t>(-of(codes) % 32) : static_cast<int64_t>(-of(first) % 32 / 4);
  const bool aligned = of(first + count) % 32 == 0 && (second == nullptr || of(second + count) % 32 == 0);
  return aligned ? count : -1;
}

inline double sum4(__m256d v) {
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, v);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

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
  const __m256i low = _mm256_set1_epi16(0x000f), high = _mm256_set1_epi16(0x0f00);
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
    const __m256i out =
        _mm256_or_si256(_mm256_and_si256(wide, low), _mm256_and_si256(_mm256_slli_epi16(wide, 4), high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), out);
  }
  return i;
}

}  // namespace

void fake_quantize(const float* x, RunParams p, int64_t count, bool stream, float* out, float* residual,
                   uint8_t* codes) {
  const Vectors v(p);
  const auto rest = [&](int64_t i, int64_t end) {
    scalar::fake_quantize(x + i, p, end - i, false, out + i, residual ? residual + i : nullptr,
                          codes ? codes + i : nullptr);
  };
  int64_t i = 0;
  const int64_t head = stream ? until_aligned(out, residual, codes) : -1;
  if (head >= 0 && head < count) {
    rest(0, head);
    for (i = head; i + 32 <= count; i += 32) {
      __m256i q4[4];
      for (int j = 0; j < 4; ++j) {
        if (j % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(x + i + 8 * j + kAhead), _MM_HINT_T0);
        const __m256 in = _mm256_loadu_ps(x + i + 8 * j);
        const __m256 q = v.code(in);
        const __m256 y = _mm256_mul_ps(v.scale, _mm256_sub_ps(q, v.zero_point));
        _mm256_stream_ps(out + i + 8 * j, y);
        if (residual != nullptr) _mm256_stream_ps(residual + i + 8 * j, _mm256_sub_ps(in, y));
        q4[j] = _mm256_cvtps_epi32(q);
      }
      if (codes != nullptr) _mm256_stream_si256(reinterpret_cast<__m256i*>(codes + i), bytes_of(q4));
    }
  }
  for (; i + 8 <= count; i += 8) {
    const __m256 in = _mm256_loadu_ps(x + i);
    const __m256 q = v.code(in);
    const __m256 y = _mm256_mul_ps(v.scale, _mm256_sub_ps(q, v.zero_point));
    _mm256_storeu_ps(out + i, y);
    if (residual != nullptr) _mm256_storeu_ps(residual + i, _mm256_sub_ps(in, y));
    if (codes != nullptr) store_bytes(_mm256_cvtps_epi32(q), codes + i);
  }
  rest(i, count);
}

double fake_quantize_backward(const float* grad, const float* x, RunParams p, int64_t count, float* grad_x) {
  const Vectors v(p);
  __m256d sum_low = _mm256_setzero_pd(), sum_high = _mm256_setzero_pd();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 g = _mm256_loadu_ps(grad + i);
    const __m256 ratio = _mm256_div_ps(_mm256_loadu_ps(x + i), v.scale);
    const __m256 rounded = Vectors::round(ratio);
    const __m256 shifted = _mm256_add_ps(rounded, v.zero_point);
    const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(shifted, _mm256_setzero_ps(), _CMP_GE_OQ),
                                        _mm256_cmp_ps(shifted, v.top, _CMP_LE_OQ));
    _mm256_storeu_ps(grad_x + i, _mm256_and_ps(inside, g));
    const __m256 slope =
        _mm256_blendv_ps(_mm256_sub_ps(v.clamp(shifted), v.zero_point), _mm256_sub_ps(rounded, ratio), inside);
    const __m256 term = _mm256_mul_ps(g, slope);
    sum_low = _mm256_add_pd(sum_low, _mm256_cvtps_pd(_mm256_castps256_ps128(term)));
    sum_high = _mm256_add_pd(sum_high, _mm256_cvtps_pd(_mm256_extractf128_ps(term, 1)));
  }
  const double sum = sum4(_mm256_add_pd(sum_low, sum_high));
  return sum + scalar::fake_quantize_backward(grad + i, x + i, p, count - i, grad_x + i);
}

double squared_error(const float* x, RunParams p, int64_t count) {
  const Vectors v(p);
  __m256d sum_low = _mm256_setzero_pd(), sum_high = _mm256_setzero_pd();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 in = _mm256_loadu_ps(x + i);
    const __m256 rest = _mm256_sub_ps(in, _mm256_mul_ps(v.scale, _mm256_sub_ps(v.code(in), v.zero_point)));
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(rest));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(rest, 1));
    sum_low = _mm256_fmadd_pd(low, low, sum_low);
    sum_high = _mm256_fmadd_pd(high, high, sum_high);
  }
  return sum4(_mm256_add_pd(sum_low, sum_high)) + scalar::squared_error(x + i, p, count - i);
}

bool pack_row(const uint8_t* codes, int64_t k, int bits, uint8_t* packed) {
  const uint64_t mask = octet_mask(bits);
  uint64_t seen = 0;
  int64_t i = 0;
  for (; i + 8 <= k; i += 8, packed += bits) {
    uint64_t octet;
    std::memcpy(&octet, codes + i, 8);
    seen |= octet;
    store_octet(packed, _pext_u64(octet, mask), bits);
  }
  const bool rest_ok = scalar::pack_row(codes + i, k - i, bits, packed);
  return rest_ok && (seen & ~mask) == 0;
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
  const __m256 s = _mm256_set1_ps(scale);
  const __m256i z = _mm256_set1_epi32(zero_point);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i q = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(s, _mm256_cvtepi32_ps(_mm256_sub_epi32(q, z))));
  }
  scalar::dequantize(codes + i, scale, zero_point, count - i, out + i);
}

}  // namespace cora::cpu::avx2

CORA_END_TARGET
#endif
