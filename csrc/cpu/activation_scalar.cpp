// Ranges and codes of activations: the baseline of every level and the arithmetic the others must match.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>

namespace cora::cpu::scalar {

namespace {

/// The comparisons are written so that a NaN falls to 0, as maxps and minps do.
inline uint8_t code(float x, RunParams p) {
  float q = std::nearbyint(x / p.scale) + p.zero_point;
  q = q > 0.0f ? q : 0.0f;
  return static_cast<uint8_t>(q < p.max_code ? q : p.max_code);
}

}  // namespace

void range(const float* x, int64_t count, float* lo, float* hi) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  *lo = low;
  *hi = high;
}

void quantize_u8(const float* x, RunParams p, int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = code(x[i], p);
}

void quantize_transpose(const float* x, int64_t ldx, int64_t rows, int64_t cols, RunParams p, uint8_t* out,
                        int64_t ldo) {
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) out[c * ldo + r] = code(x[r * ldx + c], p);
}

void max_runs(const uint8_t* x, int64_t taps, int64_t step, int64_t run, int64_t count, int64_t ldx, int64_t ldy,
              uint8_t* y) {
  for (int64_t i = 0; i < count; ++i, x += ldx, y += ldy)
    for (int64_t n = 0; n < run; ++n) {
      y[n] = x[n];
      for (int64_t t = 1; t < taps; ++t) y[n] = std::max(y[n], x[t * step + n]);
    }
}

void interleave(const uint8_t* from, const int64_t* line, int64_t lines, int64_t bytes, int64_t count, uint8_t* to) {
  for (int64_t x = 0; x < count; ++x, from += bytes)
    for (int64_t y = 0; y < lines; ++y) to = std::copy_n(from + line[y], bytes, to);
}

}  // namespace cora::cpu::scalar
