// The layer kernels as plain loops: the baseline, and the order of float steps the others keep
// wherever a comment in kernels.h fixes one.
#include "cpu/kernels.h"

#include <cmath>

namespace cora::cpu::scalar {

void interleave(const uint8_t* codes, int64_t ld, int lanes, int64_t taps, int64_t run, uint8_t* panel) {
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < run; c += kQuad)
      for (int lane = 0; lane < kTileN; ++lane)
        for (int64_t i = c; i < c + kQuad; ++i)
          *panel++ = lane < lanes && i < run ? codes[lane * ld + i * taps + t] : 0;
}

void panel_f32(const uint8_t* panel, const float* scale, const int32_t* zero_point, int64_t taps, int64_t run,
               float* out) {
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < run; c += kQuad, panel += kTileN * kQuad)
      for (int64_t i = 0; i < kQuad && c + i < run; ++i, out += kTileN)
        for (int n = 0; n < kTileN; ++n) out[n] = scale[n] * static_cast<float>(panel[n * kQuad + i] - zero_point[n]);
}

void tile_s8(const int8_t* const* rows, int64_t taps, int64_t run, const uint8_t* panel, int m, int lanes,
             int32_t* acc) {
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < run; c += kQuad, panel += kTileN * kQuad)
      for (int i = 0; i < m; ++i) {
        const int8_t* x = rows[t * kTileM + i] + c;
        for (int n = 0; n < lanes; ++n)
          for (int j = 0; j < kQuad; ++j) acc[i * kTileN + n] += x[j] * panel[n * kQuad + j];
      }
}

void tile_f32(const float* const* rows, int64_t taps, int64_t run, const float* panel, int m, int lanes, float* acc) {
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < run; ++c, panel += kTileN)
      for (int i = 0; i < m; ++i) {
        const float x = rows[t * kTileM + i][c];
        for (int n = 0; n < lanes; ++n) acc[i * kTileN + n] += x * panel[n];
      }
}

void row_sums(const int8_t* const* rows, int64_t taps, int64_t run, int m, int32_t* sums) {
  for (int i = 0; i < m; ++i) {
    int32_t sum = 0;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < run; ++c) sum += rows[t * kTileM + i][c];
    sums[i] = sum;
  }
}

void requantize(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* zw,
                const int32_t* xsum, const float* scale, float* c) {
  for (int i = 0; i < m; ++i)
    for (int n = 0; n < kTileN; ++n) {
      // Unsigned: partial products may pass 2^31, the result does not.
      const uint32_t sum = static_cast<uint32_t>(acc[i * kTileN + n]) -
                           static_cast<uint32_t>(zx[i]) * static_cast<uint32_t>(wsum[n]) -
                           static_cast<uint32_t>(zw[n]) * static_cast<uint32_t>(xsum[i]);
      c[i * kTileN + n] += static_cast<float>(static_cast<int32_t>(sum)) * scale[n];
    }
}

void finish(const float* c, int m, int lanes, const float* sx, const float* u, int64_t ldu, const float* b,
            int64_t rank, const float* bias, float* y, int64_t ldy) {
  for (int i = 0; i < m; ++i)
    for (int n = 0; n < lanes; ++n) {
      float v = c[i * kTileN + n];
      if (sx != nullptr) v *= sx[i];
      for (int64_t j = 0; j < rank; ++j) v = std::fma(u[i * ldu + j], b[j * kTileN + n], v);
      if (bias != nullptr) v += bias[n];
      y[i * ldy + n] = v;
    }
}

void dot_s8(const uint8_t* codes, const int8_t* x, int64_t ldx, int m, int64_t count, int32_t* out) {
  for (int i = 0; i <= m; ++i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += i < m ? codes[k] * x[i * ldx + k] : codes[k];
    out[i] = sum;
  }
}

void dot_f32(const uint8_t* codes, float zero_point, const float* x, int64_t ldx, int m, int64_t count, float* out) {
  for (int i = 0; i < m; ++i) {
    float sums[8] = {};  // eight partial sums: shorter chains, smaller error
    for (int64_t k = 0; k < count; ++k) sums[k & 7] += (codes[k] - zero_point) * x[i * ldx + k];
    out[i] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
}

void depthwise_f32(const float* const* rows, const float* w, int64_t taps, int64_t channels, float* y) {
  for (int64_t c = 0; c < channels; ++c) {
    float sum = 0;
    for (int64_t t = 0; t < taps; ++t) sum = std::fma(w[t * channels + c], rows[t][c], sum);
    y[c] = sum;
  }
}

void depthwise_s8(const int8_t* const* rows, int32_t zx, const uint8_t* w, const int32_t* zw, const float* scale,
                  int64_t taps, int64_t channels, float* y) {
  for (int64_t c = 0; c < channels; ++c) {
    int32_t sum = 0, xsum = 0;
    for (int64_t t = 0; t < taps; ++t) {
      const int32_t x = rows[t][c] - zx;
      sum += x * w[t * channels + c];
      xsum += x;
    }
    const uint32_t s = static_cast<uint32_t>(sum) - static_cast<uint32_t>(zw[c]) * static_cast<uint32_t>(xsum);
    y[c] += static_cast<float>(static_cast<int32_t>(s)) * scale[c];
  }
}

void depthwise_finish(float* y, float sx, const float* u, const float* b, const float* bias, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    float v = y[c] * sx;
    if (u != nullptr) v = std::fma(u[c], b[c], v);
    if (bias != nullptr) v += bias[c];
    y[c] = v;
  }
}

void transpose(const float* in, int64_t ldi, int64_t rows, int64_t cols, float* out, int64_t ldo) {
  constexpr int64_t kBlock = 16;  // both sides of a block stay in L1
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock)
    for (int64_t c0 = 0; c0 < cols; c0 += kBlock)
      for (int64_t r = r0; r < rows && r < r0 + kBlock; ++r)
        for (int64_t c = c0; c < cols && c < c0 + kBlock; ++c) out[c * ldo + r] = in[r * ldi + c];
}

}  // namespace cora::cpu::scalar
