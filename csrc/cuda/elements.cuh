// Reading and writing single elements of the float types; the types are codes (layout.h), the same for a whole launch.
#pragma once

#include "cuda/layout.h"
#include "cuda/platform.cuh"

namespace cora::cuda {

CORA_DEVICE uint32_t quotient(uint32_t n, FastDivide d) { return (multiply_high(n, d.multiplier) + n) >> d.shift; }

/// The same for indices of any size: by a division, some eighty instructions, only where there are 2^31 or more.
struct Divide {
  int64_t divisor;
  FastDivide fast;
  bool narrow;
};
inline Divide divide_by(int64_t divisor, int64_t indices) {
  const bool narrow = indices < (int64_t{1} << 31) && divisor < (int64_t{1} << 31);
  return {divisor, fast_divide(narrow && divisor > 0 ? divisor : 1), narrow};  // 0: there is nothing to divide
}
CORA_DEVICE int64_t quotient(int64_t n, const Divide& d) {
  return d.narrow ? static_cast<int64_t>(quotient(static_cast<uint32_t>(n), d.fast)) : n / d.divisor;
}

CORA_DEVICE float read_element(const void* p, int64_t i, int type) {
  if (type == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return type == kFloat16 ? widen<Half>(bits) : widen<Bfloat16>(bits);
}

CORA_DEVICE void write_element(void* p, int64_t i, int type, float value) {
  if (type == kFloat32) {
    static_cast<float*>(p)[i] = value;
  } else {
    const uint32_t bits = type == kFloat16 ? pack2<Half>(value, value) : pack2<Bfloat16>(value, value);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits);
  }
}

/// y + add, clamped, to its place.
CORA_DEVICE void finish_element(const Epilogue& e, float y, int64_t out, int64_t add) {
  if (e.add != nullptr)
    y += e.add_type == kUint8
             ? e.add_scale * static_cast<float>(static_cast<const uint8_t*>(e.add)[add] - e.add_zero)
             : read_element(e.add, add, e.add_type);
  y = y < e.low ? e.low : y;
  y = y > e.high ? e.high : y;
  if (e.out_type == kUint8) {
    const float top = static_cast<float>(e.out_top);
    float q = rintf(e.out_inverse != 0.0f ? y * e.out_inverse : divide(y, e.out_scale)) + static_cast<float>(e.out_zero);
    q = q > 0.0f ? q : 0.0f;
    static_cast<uint8_t*>(e.out)[out] = static_cast<uint8_t>(q < top ? q : top);
  } else {
    write_element(e.out, out, e.out_type, y);
  }
}

/// 16 bytes of x from floats: eight 16-bit numbers.
CORA_DEVICE uint4 pack8(const float (&v)[8], int type) {
  uint32_t r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    r[i] = type == kFloat16 ? pack2<Half>(v[2 * i], v[2 * i + 1]) : pack2<Bfloat16>(v[2 * i], v[2 * i + 1]);
  return uint4{r[0], r[1], r[2], r[3]};
}

/// Blocks of `threads` for `count` items in a grid-stride loop.
inline unsigned grid_for(int64_t count, int threads) {
  const int64_t blocks = (count + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < 65536 ? blocks : 65536);
}

CORA_DEVICE int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
CORA_DEVICE int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace cora::cuda
