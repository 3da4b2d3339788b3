// Signatures of all raw CPU kernels, torch-free. Each level's file defines those it implements in
// its own namespace; the lists at the end say who has what. Kernels are single-threaded, own
// no memory, and accept any size (tails are theirs) unless a comment says otherwise.
#pragma once

#include "cpu/isa.h"
#include "cpu/planes.h"

#include <cmath>
#include <cstdint>

namespace cora::cpu {

/// One (scale, zero-point) run: q = clamp(rint(x / scale) + zero_point, 0, max_code).
struct RunParams {
  float scale;       // > 0
  float zero_point;  // an integer, |.| < 2^24
  float max_code;    // 2^bits - 1
};

/// out = scale * (q - zero_point); residual = x - out and codes = q where not null. A NaN gives code 0.
/// `stream`: the outputs are larger than the caches, so stores may go past them; the caller fences. No two
/// arrays overlap, but for out == x.
using FakeQuantizeFn = void(const float* x, RunParams p, int64_t count, bool stream, float* out, float* residual,
                            uint8_t* codes);

/// grad_x = grad where the code was not clamped, else 0. Returns the run's scale gradient,
/// sum grad * (rint(x/s) - x/s  if not clamped  else  q - zero_point), partial sums in float64.
using FakeQuantizeBackwardFn = double(const float* grad, const float* x, RunParams p, int64_t count, float* grad_x);

/// Sum of (x - scale * (q - zero_point))^2 in float64. Ties may round either way: their error is the same.
using SquaredErrorFn = double(const float* x, RunParams p, int64_t count);

// Rounding with error feedback (ops/error_feedback.cpp): rows (two vectors of the widest level) and columns worked on
// at once.
constexpr int kFeedbackRows = 32;
constexpr int kFeedbackBlock = 32;

/// `width` columns of `rows` rows, one after the other; then what they owe to the `rest` columns after them:
///   q = clamp(rint(w / scale) + zero_point, 0, top);  e = (w - scale * (q - zero_point)) / u[k][k];
///   w[j] = w[j] - e * u[k][j] for j > k, product and difference rounded apart, k ascending.
/// Columns hold their rows side by side, w [width + rest][kFeedbackRows], scale, zero_point, q and e
/// [width][kFeedbackRows]: rows are the lanes, since they do not wait for each other. What is in the lanes after `rows`
/// may change. u [width][ldu] starts at the diagonal.
using FeedbackFn = void(float* w, int rows, const float* u, int64_t ldu, int width, int64_t rest, const float* scale,
                        const float* zero_point, float top, float* q, float* e);

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

// --- Linear and conv2d ---------------------------------------------------------------------------
// y [m, 32] = X [m, K] * W [32, K]^T for a tile of rows of x (tile_shape()) and one panel of 32 weight rows.
// K is `taps` runs of `run` consecutive elements: run t of row i starts at rows[i] + tap[t], so a
// convolution stores no im2col. A panel is a sequence of quad-rows [taps][quads][32 lanes][4], the
// integer dot product's (and an AMX tile's) operand as it stands. Elements past a run meet zeros.

/// What a level works on at once.
struct TileShape {
  int block;    // rows of x at most in a block
  int blocks;   // in a tile
  int align;    // elements of K a panel's run is padded to; x is read that far
  bool strict;  // a tile's blocks have one size, and a block's rows lie at equal distances
};
constexpr int kMaxTileM = 32;

/// Sets the tile registers up for a level's kernels and clears them again: one a task.
class TileSession {
 public:
  /// block: rows of x in a block.
  TileSession(Isa isa, int block);
  ~TileSession();
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
  const Isa isa_;
};
inline TileShape tile_shape(Isa isa) {
  return isa == Isa::kAmx ? TileShape{16, 2, 64, true} : TileShape{12, 1, kQuad, false};
}

/// Lines of pixels of a few bytes, interleaved: to[(x * lines + y) * bytes + j] = from[line[y] + x * bytes + j], for x
/// < count, y < lines, j < bytes <= 16. Past a line's end up to 64 bytes may be read, past that of `to`
/// kInterleaveSlack be written.
constexpr int64_t kInterleaveSlack = 320;
using InterleaveFn = void(const uint8_t* from, const int64_t* line, int64_t lines, int64_t bytes, int64_t count,
                          uint8_t* to);

/// y[i * ldy + n] = max over t < taps of x[i * ldx + t * step + n], for i < count, n < run; taps > 0.
using MaxRunsFn = void(const uint8_t* x, int64_t taps, int64_t step, int64_t run, int64_t count, int64_t ldx,
                       int64_t ldy, uint8_t* y);

/// Packed quad-rows (cpu/planes.h) -> int8 code - offset[lane], [rows][32][4]. offset [32]: the difference fits.
using ExpandFn = void(const uint8_t* packed, int bits, int64_t rows, const uint8_t* offset, int8_t* panel);

/// The same quad-rows as floats [4 * rows][32]: scale[lane] * (panel - far[lane]); arrays of 32.
using PanelF32Fn = void(const int8_t* panel, int64_t rows, const float* scale, const int32_t* far, float* out);

/// c[i * 32 + n] += sum of x * w over [taps][run][32] floats.
using TileF32Fn = void(const float* const* rows, const int64_t* tap, int64_t taps, int64_t run, const float* panel,
                       int m, int lanes, float* c);

/// sums[i] = sum of row i's runs.
using RowSumsFn = void(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t run, int m, int32_t* sums);

/// c[i*32+n] (+)= float(acc - zx[i] * wsum[n] - far[n] * xsum[i]) * scale[n]: a scale group's exact integer
/// becomes float. xsum is the sum of x - zx. The result fits int32 (steps may wrap); arrays of 32.
using RequantizeFn = void(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* far,
                          const int32_t* xsum, const float* scale, bool add, float* c);

// The adapter's second half. A chunk is up to 32 ranks; u and b are kept as the level multiplies them,
// kHiddenChunk floats' room a chunk.
constexpr int kHiddenChunk = kMaxTileM * kLanes;
/// c [m, 32] -> u: the hidden values of a chunk.
using StoreHiddenFn = void(const float* c, int m, int ranks, void* u);
/// The same of float(acc - correction[n]) * alpha[n].
using QuantizedHiddenFn = void(const int32_t* acc, const int32_t* correction, const float* alpha, int m, int ranks,
                               void* u);
/// b int8 [rank][32] -> out, all chunks.
using ExpandUpFn = void(const int8_t* b, int64_t rank, void* out);
/// up [m, 32] = u [m, rank] * b, rank > 0.
using UpProjectFn = void(const void* u, int m, int block, int64_t rank, const void* b, float* up);
/// Up to here the epilogue does it, with u and b as floats.
constexpr int kInlineRank = 8;

/// The last step of a tile, row i going to element at[i] of y (negative: nowhere), n < lanes:
///   v = fma(float(acc - correction[n]), alpha[n], bias[n]), or fma(c, row_scale[i] or alpha[n] or 1, bias[n])
///   v = fma(u[i][j], b[j][n], v) for j < rank; v += up; v += add's row; v = min(max(v, low), high)
/// and v as it is, or as codes: rint(v * inverse_scale) + zero_point between 0 and 255. A NaN stays one; as a code it
/// is the least.
struct Epilogue {
  const int32_t* acc;  // [m, 32], or null
  const int32_t* correction;
  const float* alpha;  // with c: or null
  const float* c;      // [m, 32] when acc is null
  const float *row_scale, *up, *bias;
  const float *u, *b;  // [m][32] and [rank][32], or null
  int64_t rank;
  const void* add;  // float, or codes when add_codes; row i at add_at[i]; null: none
  bool add_codes;
  float add_scale, add_zero;
  float low, high;
  void* y;  // float, or codes when codes
  bool codes;
  float inverse_scale;
  int32_t zero_point;

  /// Moves the destination by `to` elements and the operand of the addition, if there is one, by `from`.
  void advance(int64_t to, int64_t from) {
    y = static_cast<char*>(y) + to * (codes ? 1 : static_cast<int64_t>(sizeof(float)));
    if (add != nullptr)
      add = static_cast<const char*>(add) + from * (add_codes ? 1 : static_cast<int64_t>(sizeof(float)));
  }

  /// The same where alpha, bias and the adapter's part are multiplied by `inverse` already: by inverse_scale, or 1.
  Epilogue in_units(float inverse) const {
    Epilogue e = *this;
    if (inverse == 1.0f) return e;
    e.add_scale *= inverse;
    e.inverse_scale = 1.0f;
    return e;
  }

  // What follows from them: the bounds of v * inverse_scale that keep a code within the clamp and 0..255, and their
  // codes. Found once a call: functions of this header are not for a level's instructions.
  float code_low, code_high;
  int least_code, most_code;

  void bound_codes() {
    const auto zero = static_cast<float>(zero_point);
    code_low = std::fmax(low * inverse_scale, -zero);
    code_high = std::fmin(high * inverse_scale, 255.0f - zero);
    least_code = static_cast<int>(std::fmax(std::nearbyint(std::fmin(code_low, code_high)) + zero, 0.0f));
    most_code = static_cast<int>(std::fmax(std::nearbyint(code_high) + zero, 0.0f));
  }
};
using EpilogueFn = void(const Epilogue& e, int m, int lanes, const int64_t* at, const int64_t* add_at);

/// A tile's epilogue that has not been run yet; take(rows) is the next part of it.
struct Pending {
  Epilogue e;
  int m = 0, lanes;
  const int64_t *at, *add_at;

  template <typename Fn>
  void take(int rows, const Fn& epilogue) {
    rows = rows < m ? rows : m;
    epilogue(e, rows, lanes, at, add_at);
    m -= rows;
    at += rows;
    add_at += rows;
    if (e.acc != nullptr) e.acc += rows * kLanes;
    if (e.c != nullptr) e.c += rows * kLanes;
    if (e.up != nullptr) e.up += rows * kLanes;
    if (e.u != nullptr) e.u += rows * kLanes;
    if (e.row_scale != nullptr) e.row_scale += rows;
  }
};

/// acc[i * 32 + n] = sum of x * w, int32, no saturation on the way. The panel's runs are `quads` quad-rows, of weights
/// between -widest and widest.
/// m is `block` or twice that; the second block's rows follow the first's in acc.
using TileS8Fn = void(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
                      int widest, int m, int block, int lanes, int32_t* acc);

// --- Floats on AMX: bfloat16 planes ---------------------------------------------------------------
// AMX multiplies bfloat16 and sums in float32. Weights without their scale are integers of up to 8 bits,
// exact in bfloat16; a float32 is the sum of three bfloat16 (a float16 of two), so the products are those
// of float32.
using Bf16 = uint16_t;
constexpr int32_t kExactBf16 = 256;  // integers up to here are exact

/// x as the sum of out[p * stride + i] over `planes`, each the upper half of what those before left. False when
/// an element is above 2^96 or not finite: a sum of products with integers might overflow, or be NaN elsewhere.
using SplitFn = bool(const float* x, int64_t count, int planes, int64_t stride, Bf16* out);

/// A run's quad-rows -> panel - far[lane] as pairs of k, [2 * quads][32][2]; zeros from element `run` on.
using PanelBf16Fn = void(const int8_t* panel, int64_t run, int64_t quads, const int32_t* far, Bf16* out);

/// c[i * 32 + n] = sum of x * w, as TileS8Fn; a row's planes are `stride` elements apart. `pending` is done meanwhile.
using TileBf16Fn = void(const Bf16* const* rows, int64_t stride, int planes, const int64_t* tap, int64_t taps,
                        int64_t quads, const Bf16* panel, int m, int block, int lanes, float* c, Pending* pending);

/// c[i * 32 + n] (+)= sum[i * 32 + n] * scale[n]
using RescaleFn = void(const float* sum, int m, const float* scale, bool add, float* c);

// --- Codes on AMX ---------------------------------------------------------------------------------
// A tile's products with one panel, one scale group, of codes with one scale and zero-point; and meanwhile, on the
// vector units that the tile registers do not use, what is left to do on the products before: a Finish.

/// What an epilogue adds.
enum class Added { kNothing, kFloats, kCodes };

/// What becomes of a panel's sums.
enum class Result {
  kHidden,   // an adapter's hidden values
  kFloats,   // outputs
  kCodes,    // outputs, requantized
  kBounded,  // the same where no number of a code leaves the integers' range
};

/// A panel of the weight or of A, as the tiles of a call meet it. Arrays are of its lanes, [32].
struct CodesPanel {
  const int8_t* weights;
  const uint8_t* packed;  // not null: its packed quad-rows, expanded on the way, for one or two uses of them
  int bits;
  const uint8_t* offset;
  int64_t steps;  // of 64 of K, of a tap
  int lanes;
  const int32_t* start;  // what sums begin with, or null: zero
  const float* alpha;
  Result result;
  const int32_t* wsum;  // null: rows have one scale and zero-point. Or:
  // zx[i] * wsum[n] is still to be subtracted (0 <= zx < 256, |wsum| < 2^22), hidden values stay without their row's
  // scale, and the output, of floats, is fma(alpha * sum + up, sx[i], bias).

  int64_t chunk;  // of hidden values: which 32 ranks

  // Of outputs. Where codes become of them and no floats are added, all is in units of the codes' scale.
  const float* bias;
  const Epilogue* e;  // the last step but for what is here instead
  Added added;
  void* y;
  const void* add;
  const void* b;  // the adapter's, or null
  int64_t rank;
  const float* up_bias;  // what hidden * b begins with; bias is in it then, unless wsum
};

/// A tile's rows of x: one or two blocks of `block` rows x_stride apart.
struct CodesRows {
  const uint8_t* x[2];  // a block's first row
  int64_t x_stride;
  int block, blocks;
  const int64_t* tap;
  int64_t taps;
  void* hidden;                // as store_hidden leaves them: written by A's panels, read by the weight's
  int count;                   // rows that become outputs
  const uint8_t* from;         // which, [count], the last one twice where count is odd: so are the next two
  const int64_t *at, *add_at;  // where to in y, from where in add
  const int32_t* zx;
  const float* sx;
};

/// Sums that wait for their last step; none where `panel` is null.
struct Finish {
  const CodesPanel* panel = nullptr;
  const CodesRows* rows;
  const int32_t* sum;
  const float* up;
};

/// Memory that is needed after this tile: its lines are asked for meanwhile, so many of them in each of a block's
/// steps.
struct Ahead {
  const uint8_t* from = nullptr;
  int lines = 0;
};

struct CodesTile {
  const CodesPanel* panel;
  const CodesRows* rows;
  int32_t* sum;    // [rows][32]; of up to 16 lanes two, 16 lanes apart, still to be added up
  float* up;       // [rows][32] = up_bias + hidden * b
  Ahead ahead[2];  // read and written; moved on by what was asked for
};
/// Does a tile's products and all of `pending`.
using CodesTileFn = void(CodesTile& tile, Finish& pending);
using FinishFn = void(Finish& pending);

// --- Few rows of x: the packed panel is read once, expanded in registers -------------------------
constexpr int kGemvM = 4;
/// acc[i * 32 + n] = sum of x row i * code (8 bits: code - 128), m <= kGemvM; x [m][4 * rows], padded with zeros.
using GemvS8Fn = void(const uint8_t* packed, int bits, int64_t rows, const uint8_t* x, int64_t ldx, int m,
                      int32_t* acc);
/// c[i * 32 + n] = sum of x row i * (code - zero_point[n])
using GemvF32Fn = void(const uint8_t* packed, int bits, int64_t rows, const float* zero_point, const float* x,
                       int64_t ldx, int m, float* c);

// --- Depthwise: one filter a channel, channels contiguous, in blocks of 32 -------------------------
// A call makes `count` neighbouring output positions of a block's first `lanes` channels: c [count][32].

/// Geometry in elements of x; rows and columns are the filter's.
struct DepthwiseShape {
  int64_t rows, columns;     // that are applied
  int64_t line, pixel;       // from a row of the filter to the next, from a pixel to the next
  int64_t stride, dilation;  // horizontal, in pixels

  /// Neighbouring pixels that `count` outputs look at.
  int64_t width(int64_t count) const { return (count - 1) * stride + (columns - 1) * dilation + 1; }
  int64_t quads() const { return (rows + kQuad - 1) / kQuad; }
};

/// c[i * 32 + n] = sum over the filter's rows, then columns, of fma(x, w); w [row][column][32], rows w_row apart.
using DepthwiseF32Fn = void(const float* x, const DepthwiseShape& s, const float* w, int64_t w_row, int64_t count,
                            int lanes, float* c);

/// Lines up what depthwise_s8 multiplies: the `rows` codes that a column of the filter meets, for each of `width`
/// pixels of x and each channel. Level by level its own order; at most depthwise_strip_bytes.
using DepthwiseStripFn = void(const uint8_t* x, const DepthwiseShape& s, int64_t width, int lanes, uint8_t* strip);
inline int64_t depthwise_strip_bytes(const DepthwiseShape& s, int64_t width) {
  return width * ((s.rows + 1) / 2) * 2 * kLanes * 2;
}

/// acc[i * 32 + n] = sum of x * w, exact; w int8 [planes][column][quad of rows][32][4], where the sum of the planes is
/// the weight and rows that do not exist have weight 0.
using DepthwiseS8Fn = void(const uint8_t* strip, const DepthwiseShape& s, const int8_t* w, int64_t planes,
                           int64_t count, int lanes, int32_t* acc);

/// A block's integer filters and what turns their sums into values:
/// v = fma(float(acc - correction), alpha, bias) + float(adapter's acc - a_correction) * beta; arrays of 32.
struct DepthwiseFilter {
  const int8_t* w;  // as for depthwise_s8
  int64_t planes;
  const int32_t* correction;
  const float* alpha;
  const int8_t* a;  // one plane, or null: no adapter
  const int32_t* a_correction;
  const float* beta;
};
/// depthwise_s8 and the epilogue in one, sums never leaving the registers: codes from codes, nothing added. Output
/// positions are y_pixel apart. Same bits as the two kernels; levels without it have those.
using DepthwiseCodesFn = void(const uint8_t* strip, const DepthwiseShape& s, const DepthwiseFilter& f,
                              const Epilogue& e, int64_t count, int lanes, int64_t y_pixel);

/// out[c * ldo + r] = in[r * ldi + c]
using TransposeFn = void(const float* in, int64_t ldi, int64_t rows, int64_t cols, float* out, int64_t ldo);

// The kernels by name. Every level up to avx512 has those of the first list.
#define CORA_KERNELS_COMMON(_)                      \
  _(FakeQuantizeFn, fake_quantize)                  \
  _(FakeQuantizeBackwardFn, fake_quantize_backward) \
  _(SquaredErrorFn, squared_error)                  \
  _(FeedbackFn, feedback)                           \
  _(QuantizeU8Fn, quantize_u8)                      \
  _(QuantizeTransposeFn, quantize_transpose)        \
  _(RangeFn, range)                                 \
  _(UnpackRowFn, unpack_row)                        \
  _(InterleaveFn, interleave)                       \
  _(MaxRunsFn, max_runs)                            \
  _(DequantizeFn, dequantize)                       \
  _(ExpandFn, expand)                               \
  _(PanelF32Fn, panel_f32)                          \
  _(TileF32Fn, tile_f32)                            \
  _(RowSumsFn, row_sums)                            \
  _(RequantizeFn, requantize)                       \
  _(EpilogueFn, epilogue)                           \
  _(GemvF32Fn, gemv_f32)                            \
  _(DepthwiseF32Fn, depthwise_f32)                  \
  _(DepthwiseStripFn, depthwise_strip)              \
  _(DepthwiseS8Fn, depthwise_s8)                    \
  _(TransposeFn, transpose)
// Where vpdpbusd is worth it.
#define CORA_KERNELS_WITH_AVXVNNI(_) _(GemvS8Fn, gemv_s8)
#define CORA_KERNELS_ALL(_) _(TileS8Fn, tile_s8)
// Where the tile registers are worth it.
#define CORA_KERNELS_UP_TO_AMX(_)        \
  _(StoreHiddenFn, store_hidden)         \
  _(QuantizedHiddenFn, quantized_hidden) \
  _(ExpandUpFn, expand_up)               \
  _(UpProjectFn, up_project)
// For the tile registers only.
#define CORA_KERNELS_AMX(_)  \
  _(SplitFn, split)          \
  _(PanelBf16Fn, panel_bf16) \
  _(TileBf16Fn, tile_bf16)   \
  _(RescaleFn, rescale)      \
  _(CodesTileFn, codes_tile) \
  _(FinishFn, finish)
// No 512-bit version (pext works on 64 bits anyway): avx512 takes avx2's.
#define CORA_KERNELS_UP_TO_AVX2(_) _(PackRowFn, pack_row)

// Where 32 registers pay; the lower levels do without.
#define CORA_KERNELS_FROM_AVX512(_) _(DepthwiseCodesFn, depthwise_codes)

#define CORA_KERNELS(_)        \
  CORA_KERNELS_COMMON(_)       \
  CORA_KERNELS_WITH_AVXVNNI(_) \
  CORA_KERNELS_ALL(_)          \
  CORA_KERNELS_UP_TO_AMX(_)    \
  CORA_KERNELS_AMX(_)          \
  CORA_KERNELS_UP_TO_AVX2(_)   \
  CORA_KERNELS_FROM_AVX512(_)

#define CORA_DECLARE(Fn, name) Fn name;
namespace scalar {
CORA_KERNELS_COMMON(CORA_DECLARE)
CORA_KERNELS_WITH_AVXVNNI(CORA_DECLARE)
CORA_KERNELS_ALL(CORA_DECLARE)
CORA_KERNELS_UP_TO_AMX(CORA_DECLARE)
CORA_KERNELS_UP_TO_AVX2(CORA_DECLARE)
}  // namespace scalar
namespace avx2 {
CORA_KERNELS_COMMON(CORA_DECLARE)
CORA_KERNELS_WITH_AVXVNNI(CORA_DECLARE)
CORA_KERNELS_ALL(CORA_DECLARE)
CORA_KERNELS_UP_TO_AMX(CORA_DECLARE)
CORA_KERNELS_UP_TO_AVX2(CORA_DECLARE)
}  // namespace avx2
namespace avxvnni {
CORA_KERNELS_WITH_AVXVNNI(CORA_DECLARE)
CORA_KERNELS_ALL(CORA_DECLARE)
}  // namespace avxvnni
namespace avx512 {
CORA_KERNELS_COMMON(CORA_DECLARE)
CORA_KERNELS_WITH_AVXVNNI(CORA_DECLARE)
CORA_KERNELS_ALL(CORA_DECLARE)
CORA_KERNELS_UP_TO_AMX(CORA_DECLARE)
CORA_KERNELS_FROM_AVX512(CORA_DECLARE)
}  // namespace avx512
namespace amx {
CORA_KERNELS_ALL(CORA_DECLARE)
CORA_KERNELS_UP_TO_AMX(CORA_DECLARE)
CORA_KERNELS_AMX(CORA_DECLARE)
}  // namespace amx

// The tables k_<name>: k_fake_quantize() is the active level's kernel. What avxvnni has avx512 has too: not every CPU
// with that could fall to it.
#if CORA_X86
#define CORA_LEVELS(...) {__VA_ARGS__}
#else
#define CORA_LEVELS(first, ...) {first, nullptr, nullptr, nullptr, nullptr}
#endif
#define CORA_TABLE(Fn, name)                       \
  inline constexpr KernelTable<Fn> k_##name{#name, \
                                            CORA_LEVELS(scalar::name, avx2::name, nullptr, avx512::name, nullptr)};
#define CORA_TABLE_WITH_AVXVNNI(Fn, name)    \
  inline constexpr KernelTable<Fn> k_##name{ \
      #name, CORA_LEVELS(scalar::name, avx2::name, avxvnni::name, avx512::name, nullptr)};
#define CORA_TABLE_ALL(Fn, name)             \
  inline constexpr KernelTable<Fn> k_##name{ \
      #name, CORA_LEVELS(scalar::name, avx2::name, avxvnni::name, avx512::name, amx::name)};
#define CORA_TABLE_UP_TO_AMX(Fn, name)             \
  inline constexpr KernelTable<Fn> k_##name{#name, \
                                            CORA_LEVELS(scalar::name, avx2::name, nullptr, avx512::name, amx::name)};
#define CORA_TABLE_AMX(Fn, name) \
  inline constexpr KernelTable<Fn> k_##name{#name, CORA_LEVELS(nullptr, nullptr, nullptr, nullptr, amx::name)};
#define CORA_TABLE_UP_TO_AVX2(Fn, name) \
  inline constexpr KernelTable<Fn> k_##name{#name, CORA_LEVELS(scalar::name, avx2::name, nullptr, nullptr, nullptr)};
#if CORA_X86
#define CORA_TABLE_FROM_AVX512(Fn, name) \
  inline constexpr KernelTable<Fn> k_##name{#name, {nullptr, nullptr, nullptr, avx512::name, nullptr}};
#else
#define CORA_TABLE_FROM_AVX512(Fn, name) inline constexpr KernelTable<Fn> k_##name{#name, {}};
#endif
CORA_KERNELS_COMMON(CORA_TABLE)
CORA_KERNELS_WITH_AVXVNNI(CORA_TABLE_WITH_AVXVNNI)
CORA_KERNELS_ALL(CORA_TABLE_ALL)
CORA_KERNELS_UP_TO_AMX(CORA_TABLE_UP_TO_AMX)
CORA_KERNELS_AMX(CORA_TABLE_AMX)
CORA_KERNELS_UP_TO_AVX2(CORA_TABLE_UP_TO_AVX2)
CORA_KERNELS_FROM_AVX512(CORA_TABLE_FROM_AVX512)

}  // namespace cora::cpu
