// Signatures of all raw CPU kernels, torch-free. Each level's file defines those it implements in
// its own namespace; the lists at the end say who has what. Kernels are single-threaded, own
// no memory, and accept any size (tails are theirs) unless a comment says otherwise.
#pragma once

#include "cpu/isa.h"

#include <cstdint>

namespace cora::cpu {

/// One (scale, zero-point) run: q = clamp(rint(x / scale) + zero_point, 0, max_code).
struct RunParams {
  float scale;       // > 0
  float zero_point;  // an integer, |.| < 2^24
  float max_code;    // 2^bits - 1
};

/// out = scale * (q - zero_point); residual = x - out and codes = q where not null. A NaN gives code 0.
/// `stream`: the outputs are larger than the caches, so stores may go past them. No two arrays overlap,
/// but for out == x.
using FakeQuantizeFn = void(const float* x, RunParams p, int64_t count, bool stream, float* out, float* residual,
                            uint8_t* codes);

/// grad_x = grad where the code was not clamped, else 0. Returns the run's scale gradient,
/// sum grad * (rint(x/s) - x/s  if not clamped  else  q - zero_point), partial sums in float64.
using FakeQuantizeBackwardFn = double(const float* grad, const float* x, RunParams p, int64_t count, float* grad_x);

/// xs[i] = q - 128 as int8 (the signed operand of the integer kernels), codes of 8 bits or fewer.
using QuantizeS8Fn = void(const float* x, RunParams p, int64_t count, int8_t* xs);

/// codes[i] = q; a NaN gives code 0.
using QuantizeU8Fn = void(const float* x, RunParams p, int64_t count, uint8_t* codes);

/// out[c * ldo + r] = the code of x[r * ldx + c]: channels of pixels become pixels of channels. Bytes rows .. ldo - 1
/// of a pixel are not touched.
using QuantizeTransposeFn = void(const float* x, int64_t ldx, int64_t rows, int64_t cols, RunParams p, uint8_t* out,
                                 int64_t ldo);

/// Minimum and maximum of x and 0.
using RangeFn = void(const float* x, int64_t count, float* lo, float* hi);

/// codes [k] -> bytes [row_bytes(k, bits)]; false when a code exceeds 2^bits - 1.
using PackRowFn = bool(const uint8_t* codes, int64_t k, int bits, uint8_t* packed);
using UnpackRowFn = void(const uint8_t* packed, int64_t k, int bits, uint8_t* codes);

/// out[i] = scale * (codes[i] - zero_point)
using DequantizeFn = void(const uint8_t* codes, float scale, int32_t zero_point, int64_t count, float* out);

// --- Tile kernels of linear and conv2d ----------------------------------------------------------
// C [m, 32] += X [m, K] * W [32, K]^T for up to kTileM rows of x and one panel of kTileN weight rows.
// K is `taps` runs of `run` consecutive elements: rows[t * kTileM + i] points at run t of row i. A
// linear layer has one run, a convolution one per kernel position, so no im2col is stored.
constexpr int kTileM = 12;
constexpr int kTileN = 32;
constexpr int kQuad = 4;  // elements of K one lane of the integer dot product takes

/// Codes [lanes][ld] -> integer panel[t][c / 4][32][4]: element (t, c) of a lane is its code c * taps + t.
/// run is rounded up to a multiple of 4 with zeros; lanes beyond `lanes` are zero. Up to 4 bytes past a
/// lane's last code are read.
using InterleaveFn = void(const uint8_t* codes, int64_t ld, int lanes, int64_t taps, int64_t run, uint8_t* panel);

/// The integer panel as floats: out[t][c][32] = scale[lane] * (code - zero_point[lane]); arrays of 32.
using PanelF32Fn = void(const uint8_t* panel, const float* scale, const int32_t* zero_point, int64_t taps, int64_t run,
                        float* out);

/// acc[i * 32 + n] += sum of x * w: x int8, w unsigned up to 255, int32, no saturation on the way.
/// The last run's up to 3 bytes past `run` are read (times zero). Only `lanes` <= 32 need be computed.
using TileS8Fn = void(const int8_t* const* rows, int64_t taps, int64_t run, const uint8_t* panel, int m, int lanes,
                      int32_t* acc);
using TileF32Fn = void(const float* const* rows, int64_t taps, int64_t run, const float* panel, int m, int lanes,
                       float* acc);

/// sums[i] = sum of row i's runs.
using RowSumsFn = void(const int8_t* const* rows, int64_t taps, int64_t run, int m, int32_t* sums);

/// c[i*32+n] += float(acc - zx[i] * wsum[n] - zw[n] * xsum[i]) * scale[n]: a scale group's exact integer
/// becomes float. xsum is the sum of x - zx. The result fits int32 (steps may wrap); arrays of 32.
using RequantizeFn = void(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* zw,
                          const int32_t* xsum, const float* scale, float* c);

/// y[i*ldy+n] = c[i*32+n] * sx[i] (null: 1), then fma(u[i*ldu+j], b[j*32+n], y) for j ascending, then
/// + bias[n] (null: none; else 32 floats).
using FinishFn = void(const float* c, int m, int lanes, const float* sx, const float* u, int64_t ldu, const float* b,
                      int64_t rank, const float* bias, float* y, int64_t ldy);

// --- Few rows of x: dot products along K, codes as unpacked --------------------------------------
/// out[i] = sum of codes * x row i, i < m <= kDotM; out[m] = sum of codes. int32.
constexpr int kDotM = 4;
using DotS8Fn = void(const uint8_t* codes, const int8_t* x, int64_t ldx, int m, int64_t count, int32_t* out);
/// out[i] = sum of (code - zero_point) * x row i
using DotF32Fn = void(const uint8_t* codes, float zero_point, const float* x, int64_t ldx, int m, int64_t count,
                      float* out);

// --- Depthwise: one weight row a channel, channels contiguous -------------------------------------
/// y[c] = sum over t of w[t * channels + c] * rows[t][c], fma, t ascending.
using DepthwiseF32Fn = void(const float* const* rows, const float* w, int64_t taps, int64_t channels, float* y);
/// y[c] += float(sum over t of (w - zw[c]) * (x - zx)) * scale[c]; the sum fits int32.
using DepthwiseS8Fn = void(const int8_t* const* rows, int32_t zx, const uint8_t* w, const int32_t* zw,
                           const float* scale, int64_t taps, int64_t channels, float* y);
/// y[c] = fma(u[c], b[c], y[c] * sx) + bias[c]; u with b, and bias, may be null.
using DepthwiseFinishFn = void(float* y, float sx, const float* u, const float* b, const float* bias, int64_t channels);

/// out[c * ldo + r] = in[r * ldi + c]
using TransposeFn = void(const float* in, int64_t ldi, int64_t rows, int64_t cols, float* out, int64_t ldo);

// The kernels by name. Every level has those of the first list.
#define CORA_KERNELS_COMMON(_)                      \
  _(FakeQuantizeFn, fake_quantize)                  \
  _(FakeQuantizeBackwardFn, fake_quantize_backward) \
  _(QuantizeS8Fn, quantize_s8)                      \
  _(QuantizeU8Fn, quantize_u8)                      \
  _(QuantizeTransposeFn, quantize_transpose)        \
  _(RangeFn, range)                                 \
  _(UnpackRowFn, unpack_row)                        \
  _(DequantizeFn, dequantize)                       \
  _(InterleaveFn, interleave)                       \
  _(PanelF32Fn, panel_f32)                          \
  _(TileS8Fn, tile_s8)                              \
  _(TileF32Fn, tile_f32)                            \
  _(RowSumsFn, row_sums)                            \
  _(RequantizeFn, requantize)                       \
  _(FinishFn, finish)                               \
  _(DotS8Fn, dot_s8)                                \
  _(DotF32Fn, dot_f32)                              \
  _(DepthwiseF32Fn, depthwise_f32)                  \
  _(DepthwiseS8Fn, depthwise_s8)                    \
  _(DepthwiseFinishFn, depthwise_finish)            \
  _(TransposeFn, transpose)
// No 512-bit version (pext works on 64 bits anyway): avx512 takes avx2's.
#define CORA_KERNELS_UP_TO_AVX2(_) _(PackRowFn, pack_row)

#define CORA_DECLARE(Fn, name) Fn name;
namespace scalar {
CORA_KERNELS_COMMON(CORA_DECLARE)
CORA_KERNELS_UP_TO_AVX2(CORA_DECLARE)
}  // namespace scalar
namespace avx2 {
CORA_KERNELS_COMMON(CORA_DECLARE)
CORA_KERNELS_UP_TO_AVX2(CORA_DECLARE)
}  // namespace avx2
namespace avx512 {
CORA_KERNELS_COMMON(CORA_DECLARE)
}  // namespace avx512

// The tables k_<name>: k_fake_quantize() is the active level's kernel.
#if CORA_X86
#define CORA_TABLE(Fn, name) inline constexpr KernelTable<Fn> k_##name{#name, {scalar::name, avx2::name, avx512::name}};
#define CORA_TABLE_UP_TO_AVX2(Fn, name) \
  inline constexpr KernelTable<Fn> k_##name{#name, {scalar::name, avx2::name, nullptr}};
#else
#define CORA_TABLE(Fn, name) inline constexpr KernelTable<Fn> k_##name{#name, {scalar::name, nullptr, nullptr}};
#define CORA_TABLE_UP_TO_AVX2(Fn, name) CORA_TABLE(Fn, name)
#endif
CORA_KERNELS_COMMON(CORA_TABLE)
CORA_KERNELS_UP_TO_AVX2(CORA_TABLE_UP_TO_AVX2)

}  // namespace cora::cpu
