// Quantization, ranges, packing: the baseline of every level and the arithmetic the others must match.
#include "bits.h"
#include "cpu/kernels.h"

#include <cmath>

namespace cora::cpu::scalar {

namespace {

/// rint(x / scale) + zero_point, not yet clamped. nearbyint: the current rounding mode, half to even.
inline float unclamped(float x, RunParams p) { return std::nearbyint(x / p.scale) + p.zero_point; }

/// The comparisons are written so that a NaN falls to 0, as maxps and minps do.
inline float clamp_code(float v, float max_code) {
  v = v > 0.0f ? v : 0.0f;
  return v < max_code ? v : max_code;
}

template <int kBits>
void unpack_row_bits(const uint8_t* packed, int64_t k, uint8_t* codes) {
  int64_t i = 0;
  for (; i + 8 <= k; i += 8, packed += kBits) {
    const uint64_t octet = load_octet(packed, kBits);
    for (int j = 0; j < 8; ++j) codes[i + j] = static_cast<uint8_t>((octet >> (j * kBits)) & ((1u << kBits) - 1));
  }
  for (int64_t j = 0; i + j < k; ++j) codes[i + j] = get_code(packed, j, kBits);
}

}  // namespace

void fake_quantize(const float* x, RunParams p, int64_t count, bool, float* out, float* residual, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float in = x[i];
    const float q = clamp_code(unclamped(in, p), p.max_code);
    const float y = p.scale * (q - p.zero_point);
    out[i] = y;
    if (residual != nullptr) residual[i] = in - y;
    if (codes != nullptr) codes[i] = static_cast<uint8_t>(q);
  }
}

double fake_quantize_backward(const float* grad, const float* x, RunParams p, int64_t count, float* grad_x) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float ratio = x[i] / p.scale;
    const float rounded = std::nearbyint(ratio);
    const float v = rounded + p.zero_point;
    const bool inside = v >= 0.0f && v <= p.max_code;
    grad_x[i] = inside ? grad[i] : 0.0f;
    sum += grad[i] * (inside ? rounded - ratio : clamp_code(v, p.max_code) - p.zero_point);
  }
  return sum;
}

double squared_error(const float* x, RunParams p, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double rest = x[i] - p.scale * (clamp_code(unclamped(x[i], p), p.max_code) - p.zero_point);
    sum += rest * rest;
  }
  return sum;
}

bool pack_row(const uint8_t* codes, int64_t k, int bits, uint8_t* packed) {
  const unsigned limit = static_cast<unsigned>(max_code(bits));
  unsigned seen = 0;
  int64_t i = 0;
  for (; i + 8 <= k; i += 8, packed += bits) {
    uint64_t octet = 0;
    for (int j = 0; j < 8; ++j) {
      seen |= codes[i + j];
      octet |= static_cast<uint64_t>(codes[i + j] & limit) << (j * bits);
    }
    store_octet(packed, octet, bits);
  }
  uint64_t rest = 0;
  for (int j = 0; i + j < k; ++j) {
    seen |= codes[i + j];
    rest |= static_cast<uint64_t>(codes[i + j] & limit) << (j * bits);
  }
  for (int64_t byte = 0; byte < row_bytes(k - i, bits); ++byte) packed[byte] = static_cast<uint8_t>(rest >> (8 * byte));
  return seen <= limit;
}

void unpack_row(const uint8_t* packed, int64_t k, int bits, uint8_t* codes) {
  CORA_DISPATCH_BITS(bits, [&] { unpack_row_bits<kBits>(packed, k, codes); });
}

void dequantize(const uint8_t* codes, float scale, int32_t zero_point, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = scale * static_cast<float>(codes[i] - zero_point);
}

}  // namespace cora::cpu::scalar
