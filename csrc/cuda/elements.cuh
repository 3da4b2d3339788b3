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

/// y + element `add` of e.add, clamped.
CORA_DEVICE float add_and_clamp(const Epilogue& e, float y, int64_t add) {
  if (e.add != nullptr)
    y += e.add_type == kUint8 ? e.add_scale * static_cast<float>(static_cast<const uint8_t*>(e.add)[add] - e.add_zero)
                              : read_element(e.add, add, e.add_type);
  y = y < e.low ? e.low : y;
  return y > e.high ? e.high : y;
}

/// The same to its place.
CORA_DEVICE void finish_element(const Epilogue& e, float y, int64_t out, int64_t add) {
  y = add_and_clamp(e, y, add);
  if (e.out_type == kUint8) {
    const float top = static_cast<float>(e.out_top);
    float q =
        rintf(e.out_inverse != 0.0f ? y * e.out_inverse : divide(y, e.out_scale)) + static_cast<float>(e.out_zero);
    q = q > 0.0f ? q : 0.0f;
    static_cast<uint8_t*>(e.out)[out] = static_cast<uint8_t>(q < top ? q : top);
  } else {
    write_element(e.out, out, e.out_type, y);
  }
}

/// One of `threads` threads fills its share: 16 channels of a pixel of the border at a time, or one.
CORA_DEVICE void fill_border(const Border& b, int64_t thread, int64_t threads) {
  if (b.codes == nullptr) return;
  const int piece = b.channels % 16 == 0 && reinterpret_cast<uintptr_t>(b.codes) % 16 == 0 ? 16 : 1;
  const uint32_t pieces = static_cast<uint32_t>(b.channels / piece),
                 whole_rows = static_cast<uint32_t>(b.halo * b.width);
  const uint32_t ring = 2 * whole_rows + static_cast<uint32_t>(2 * b.halo * (b.height - 2 * b.halo));
  const uint32_t value = static_cast<uint32_t>(b.value) * 0x01010101u;
  for (int64_t i = thread; i < int64_t{ring} * pieces * b.items; i += threads) {
    const int64_t pixel = i / pieces, item = pixel / ring;
    const uint32_t channel = static_cast<uint32_t>(i - pixel * pieces), at = static_cast<uint32_t>(pixel - item * ring);
    // The rows above, the rows below, then left and right of the others.
    uint32_t row, column;
    if (at < 2 * whole_rows) {
      row = at / b.width;
      column = at - row * b.width;
      if (at >= whole_rows) row += static_cast<uint32_t>(b.height - 2 * b.halo);
    } else {
      const uint32_t side = at - 2 * whole_rows;
      row = side / (2 * b.halo);
      column = side - row * 2 * b.halo;
      row += b.halo;
      if (column >= static_cast<uint32_t>(b.halo)) column += static_cast<uint32_t>(b.width - 2 * b.halo);
    }
    uint8_t* const to = b.codes + ((item * b.height + row) * b.width + column) * b.channels + channel * piece;
    if (piece == 16)
      store(to, uint4{value, value, value, value});
    else
      *to = static_cast<uint8_t>(value);
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
