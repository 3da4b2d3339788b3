// The layer kernels as plain loops: the baseline, and the order of float steps the others keep
// wherever a comment in kernels.h fixes one.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>

namespace cora::cpu::scalar {

namespace {

/// A NaN stays one.
float clamp(float v, float low, float high) {
  const float least = v < low ? low : v;
  return least > high ? high : least;
}

/// A NaN gives low, as there is no code for it.
float clamp_code(float v, float low, float high) {
  const float least = v > low ? v : low;
  return least < high ? least : high;
}

}  // namespace

void expand(const uint8_t* packed, int bits, int64_t rows, const uint8_t* offset, int8_t* panel) {
  for (int64_t r = 0; r < rows; ++r, packed += quad_row_bytes(bits), panel += kQuadRow) {
    uint8_t codes[kQuadRow];
    unpack_quad_row(packed, bits, codes);
    for (int i = 0; i < kQuadRow; ++i) panel[i] = static_cast<int8_t>(codes[i] - offset[i / kQuad]);
  }
}

void panel_f32(const int8_t* panel, int64_t rows, const float* scale, const int32_t* far, float* out) {
  for (int64_t r = 0; r < rows; ++r, panel += kQuadRow)
    for (int i = 0; i < kQuad; ++i, out += kLanes)
      for (int n = 0; n < kLanes; ++n) out[n] = scale[n] * static_cast<float>(panel[n * kQuad + i] - far[n]);
}

void tile_s8(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
             int /*widest*/, int m, int /*block*/, int lanes, int32_t* acc) {
  std::fill_n(acc, m * kLanes, 0);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t q = 0; q < quads; ++q, panel += kQuadRow)
      for (int i = 0; i < m; ++i) {
        const uint8_t* x = rows[i] + tap[t] + q * kQuad;
        for (int n = 0; n < lanes; ++n)
          for (int j = 0; j < kQuad; ++j) acc[i * kLanes + n] += x[j] * panel[n * kQuad + j];
      }
}

void tile_f32(const float* const* rows, const int64_t* tap, int64_t taps, int64_t run, const float* panel, int m,
              int lanes, float* c) {
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t k = 0; k < run; ++k, panel += kLanes)
      for (int i = 0; i < m; ++i) {
        const float x = rows[i][tap[t] + k];
        for (int n = 0; n < lanes; ++n) c[i * kLanes + n] += x * panel[n];
      }
}

void row_sums(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t run, int m, int32_t* sums) {
  for (int i = 0; i < m; ++i) {
    int32_t sum = 0;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t k = 0; k < run; ++k) sum += rows[i][tap[t] + k];
    sums[i] = sum;
  }
}

void requantize(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* far,
                const int32_t* xsum, const float* scale, bool add, float* c) {
  for (int i = 0; i < m; ++i)
    for (int n = 0; n < kLanes; ++n) {
      // Unsigned: partial products may pass 2^31, the result does not.
      const uint32_t sum = static_cast<uint32_t>(acc[i * kLanes + n]) -
                           static_cast<uint32_t>(zx[i]) * static_cast<uint32_t>(wsum[n]) -
                           static_cast<uint32_t>(far[n]) * static_cast<uint32_t>(xsum[i]);
      const float value = static_cast<float>(static_cast<int32_t>(sum)) * scale[n];
      c[i * kLanes + n] = add ? c[i * kLanes + n] + value : value;
    }
}

void store_hidden(const float* c, int m, int /*ranks*/, void* u) { std::copy_n(c, m * kLanes, static_cast<float*>(u)); }

void quantized_hidden(const int32_t* acc, const int32_t* correction, const float* alpha, int m, int /*ranks*/,
                      void* u) {
  for (int i = 0; i < m * kLanes; ++i)
    static_cast<float*>(u)[i] = static_cast<float>(acc[i] - correction[i % kLanes]) * alpha[i % kLanes];
}

void expand_up(const int8_t* b, int64_t rank, void* out) { std::copy_n(b, rank * kLanes, static_cast<float*>(out)); }

void up_project(const void* u, int m, int /*block*/, int64_t rank, const void* b, float* up) {
  std::fill_n(up, m * kLanes, 0.0f);
  for (int64_t j = 0; j < rank; ++j)
    for (int i = 0; i < m; ++i) {
      const float hidden = static_cast<const float*>(u)[j / kLanes * kHiddenChunk + i * kLanes + j % kLanes];
      for (int n = 0; n < kLanes; ++n)
        up[i * kLanes + n] = std::fma(hidden, static_cast<const float*>(b)[j * kLanes + n], up[i * kLanes + n]);
    }
}

void epilogue(const Epilogue& e, int m, int lanes, const int64_t* at, const int64_t* add_at) {
  for (int i = 0; i < m; ++i) {
    if (at[i] < 0) continue;
    for (int n = 0; n < lanes; ++n) {
      const int k = i * kLanes + n;
      const float value = e.acc != nullptr ? static_cast<float>(e.acc[k] - e.correction[n]) : e.c[k];
      const float factor = e.row_scale != nullptr ? e.row_scale[i] : e.alpha != nullptr ? e.alpha[n] : 1.0f;
      float v = std::fma(value, factor, e.bias != nullptr ? e.bias[n] : 0.0f);
      if (e.u != nullptr)
        for (int64_t j = 0; j < e.rank; ++j) v = std::fma(e.u[i * kLanes + j], e.b[j * kLanes + n], v);
      if (e.up != nullptr) v += e.up[k];
      if (e.add != nullptr && e.add_codes)
        v = std::fma(static_cast<float>(static_cast<const uint8_t*>(e.add)[add_at[i] + n]) - e.add_zero, e.add_scale,
                     v);
      else if (e.add != nullptr)
        v += static_cast<const float*>(e.add)[add_at[i] + n];
      if (e.codes) {
        const float code = clamp_code(v * e.inverse_scale, e.code_low, e.code_high);
        static_cast<uint8_t*>(e.y)[at[i] + n] =
            static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(code)) + e.zero_point);
      } else {
        static_cast<float*>(e.y)[at[i] + n] = clamp(v, e.low, e.high);
      }
    }
  }
}

void gemv_s8(const uint8_t* packed, int bits, int64_t rows, const uint8_t* x, int64_t ldx, int m, int32_t* acc) {
  std::fill_n(acc, m * kLanes, 0);
  const int offset = bits == 8 ? 128 : 0;
  for (int64_t r = 0; r < rows; ++r, packed += quad_row_bytes(bits)) {
    uint8_t codes[kQuadRow];
    unpack_quad_row(packed, bits, codes);
    for (int i = 0; i < m; ++i)
      for (int k = 0; k < kQuadRow; ++k)
        acc[i * kLanes + k / kQuad] += x[i * ldx + r * kQuad + k % kQuad] * (codes[k] - offset);
  }
}

void gemv_f32(const uint8_t* packed, int bits, int64_t rows, const float* zero_point, const float* x, int64_t ldx,
              int m, float* c) {
  std::fill_n(c, m * kLanes, 0.0f);
  for (int64_t r = 0; r < rows; ++r, packed += quad_row_bytes(bits)) {
    uint8_t codes[kQuadRow];
    unpack_quad_row(packed, bits, codes);
    for (int i = 0; i < m; ++i)
      for (int k = 0; k < kQuadRow; ++k)
        c[i * kLanes + k / kQuad] += x[i * ldx + r * kQuad + k % kQuad] * (codes[k] - zero_point[k / kQuad]);
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
