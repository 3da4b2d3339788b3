// Signatures of all raw CPU kernels, torch-free. Each level's file defines those it implements in
// its own namespace; the KernelTables at the end say who has what. Kernels are single-threaded, own
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
using FakeQuantizeFn = void(const float* x, RunParams p, int64_t count, float* out, float* residual,
                            uint8_t* codes);

/// grad_x = grad where the code was not clamped, else 0. Returns the run's scale gradient,
/// sum grad * (rint(x/s) - x/s  if not clamped  else  q - zero_point), partial sums in float64.
using FakeQuantizeBackwardFn = double(const float* grad, const float* x, RunParams p, int64_t count,
                                      float* grad_x);

/// xs[i] = q - 128 as int8 (the signed operand of the integer kernels), codes of 8 bits or fewer.
using QuantizeS8Fn = void(const float* x, RunParams p, int64_t count, int8_t* xs);

/// Minimum and maximum of x and 0.
using RangeFn = void(const float* x, int64_t count, float* lo, float* hi);

/// codes [k] -> bytes [row_bytes(k, bits)]; false when a code exceeds 2^bits - 1.
using PackRowFn = bool(const uint8_t* codes, int64_t k, int bits, uint8_t* packed);
using UnpackRowFn = void(const uint8_t* packed, int64_t k, int bits, uint8_t* codes);

/// out[i] = scale * (codes[i] - zero_point)
using DequantizeFn = void(const uint8_t* codes, float scale, int32_t zero_point, int64_t count, float* out);

// --- The tile kernels of linear and conv2d ----------------------------------------------------
// C [m, 32] += X [m, K] * W [32, K]^T for up to kTileM rows of x and one panel of kTileN weight rows.
// K is `taps` runs of `run` consecutive elements: rows[t * kTileM + i] points at run t of row i (a
// linear layer has one run; a convolution one per kernel position, so no im2col is stored).
constexpr int kTileM = 12;
constexpr int kTileN = 32;
constexpr int kQuad = 4;  // elements of K that one lane of the integer dot product takes

/// Interleaves codes [lanes][ld] (ld >= last index + 4 readable bytes a row) into an integer panel
/// panel[t][c / 4][32][4]: element (t, c) of a lane is codes[lane][c * taps + t]; run is rounded up to
/// a multiple of 4 with zeros, lanes beyond `lanes` are zero.
using InterleaveFn = void(const uint8_t* codes, int64_t ld, int lanes, int64_t taps, int64_t run,
                          uint8_t* panel);

/// The integer panel above as floats panel_f32[t][c][32] = scale[lane] * (code - zero_point[lane]).
using PanelF32Fn = void(const uint8_t* panel, const float* scale, const int32_t* zero_point, int64_t taps,
                        int64_t run, float* panel_f32);

/// acc[i * 32 + n] += sum x * w, x int8, w unsigned bytes up to 255, int32 without saturation.
/// run is a multiple of 4 (padded; see InterleaveFn). `lanes` <= 32: only those need be computed.
using TileS8Fn = void(const int8_t* const* rows, int64_t taps, int64_t run, const uint8_t* panel, int m,
                      int lanes, int32_t* acc);
using TileF32Fn = void(const float* const* rows, int64_t taps, int64_t run, const float* panel, int m,
                       int lanes, float* acc);

/// sums[i] = sum over the runs of x (int8).
using RowSumsFn = void(const int8_t* const* rows, int64_t taps, int64_t run, int m, int32_t* sums);

/// c[i*32+n] += float(acc - zx[i]*wsum[n] - zw[n]*xsum[i]) * scale[n]: one scale group's exact integer
/// becomes float. xsum is the sum of (x - zx) over the group's K; everything fits int32 (the caller checked).
using RequantizeFn = void(const int32_t* acc, int m, int lanes, const int32_t* zx, const int32_t* wsum,
                          const int32_t* zw, const int32_t* xsum, const float* scale, float* c);

/// y[i*ldy + n] = c[i*32+n] * sx[i] (sx may be null: 1), then fma(u[i*ldu + j], b[j*32 + n], y) for j
/// ascending, then + bias[n] (may be null).
using FinishFn = void(const float* c, int m, int lanes, const float* sx, const float* u, int64_t ldu,
                      const float* b, int64_t rank, const float* bias, float* y, int64_t ldy);

// --- Few rows of x: dot products along K, weights straight from the unpacked row -----------------
/// out[i] = sum codes * x[i], int32; up to kDotM rows at stride ldx.
constexpr int kDotM = 4;
using DotS8Fn = void(const uint8_t* codes, const int8_t* x, int64_t ldx, int m, int64_t count, int32_t* out);
/// out[i] = sum (code - zero_point) * x[i]
using DotF32Fn = void(const uint8_t* codes, float zero_point, const float* x, int64_t ldx, int m,
                      int64_t count, float* out);

/// Depthwise: y[p] = sum_t w[t * channels + c] * x_t[c] over channels (taps in order, fma) + bias.
using DepthwiseF32Fn = void(const float* const* taps_x, const float* w, const float* bias, int64_t taps,
                            int64_t channels, float* y);

#define CORA_DECLARE_KERNELS          \
  FakeQuantizeFn fake_quantize;       \
  FakeQuantizeBackwardFn fake_quantize_backward; \
  QuantizeS8Fn quantize_s8;           \
  RangeFn range;                      \
  PackRowFn pack_row;                 \
  UnpackRowFn unpack_row;             \
  DequantizeFn dequantize;            \
  InterleaveFn interleave;            \
  PanelF32Fn panel_f32;               \
  TileS8Fn tile_s8;                   \
  TileF32Fn tile_f32;                 \
  RowSumsFn row_sums;                 \
  RequantizeFn requantize;            \
  FinishFn finish;                    \
  DotS8Fn dot_s8;                     \
  DotF32Fn dot_f32;                   \
  DepthwiseF32Fn depthwise_f32;

namespace scalar { CORA_DECLARE_KERNELS }
namespace avx2 { CORA_DECLARE_KERNELS }
namespace avx512 { CORA_DECLARE_KERNELS }

#if CORA_X86
#define CORA_KERNEL_TABLE(Fn, name) inline constexpr KernelTable<Fn> k_##name{#name, {scalar::name, avx2::name, avx512::name}}
#define CORA_KERNEL_TABLE_AVX2(Fn, name) inline constexpr KernelTable<Fn> k_##name{#name, {scalar::name, avx2::name, nullptr}}
#else
#define CORA_KERNEL_TABLE(Fn, name) inline constexpr KernelTable<Fn> k_##name{#name, {scalar::name, nullptr, nullptr}}
#define CORA_KERNEL_TABLE_AVX2(Fn, name) CORA_KERNEL_TABLE(Fn, name)
#endif

}  // namespace cora::cpu
