// Depthwise kernels as plain loops: the baseline. The strip is [pixel][quad of rows][32][4] bytes.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>

namespace cora::cpu::scalar {

void depthwise_f32(const float* x, const DepthwiseShape& s, const float* w, int64_t w_row, int64_t count, int lanes,
                   float* c) {
  std::fill_n(c, count * kLanes, 0.0f);
  for (int64_t ky = 0; ky < s.rows; ++ky)
    for (int64_t kx = 0; kx < s.columns; ++kx)
      for (int64_t i = 0; i < count; ++i) {
        const float* from = x + ky * s.line + (i * s.stride + kx * s.dilation) * s.pixel;
        for (int n = 0; n < lanes; ++n)
          c[i * kLanes + n] = std::fma(from[n], w[ky * w_row + kx * kLanes + n], c[i * kLanes + n]);
      }
}

void depthwise_strip(const uint8_t* x, const DepthwiseShape& s, int64_t width, int lanes, uint8_t* strip) {
  for (int64_t i = 0; i < width; ++i, x += s.pixel)
    for (int64_t ky = 0; ky < s.quads() * kQuad; ky += kQuad, strip += kQuadRow)
      for (int n = 0; n < lanes; ++n)
        for (int64_t j = 0; j < kQuad; ++j) strip[n * kQuad + j] = ky + j < s.rows ? x[(ky + j) * s.line + n] : 0;
}

void depthwise_s8(const uint8_t* strip, const DepthwiseShape& s, const int8_t* w, int64_t planes, int64_t count,
                  int lanes, int32_t* acc) {
  std::fill_n(acc, count * kLanes, 0);
  const int64_t column = s.quads() * kQuadRow;
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t kx = 0; kx < s.columns; ++kx, w += column)
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* x = strip + (i * s.stride + kx * s.dilation) * column;
        for (int64_t quad = 0; quad < column; quad += kQuadRow)
          for (int n = 0; n < lanes; ++n)
            for (int64_t j = quad + n * kQuad; j < quad + (n + 1) * kQuad; ++j) acc[i * kLanes + n] += x[j] * w[j];
      }
}

}  // namespace cora::cpu::scalar
