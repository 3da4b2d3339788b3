// What:     y = x W^T + (x A^T) B^T + bias for a packed weight W and an int8 adapter, x a matrix or the windows of a
//           convolution (implicit GEMM: K = taps x channels, x channels-last). W enters the tensor cores as their
//           first operand, x as the second: a token (or pixel) fills 1/8 of an instruction, not 1/16, which is what
//           decoding one token at a time wants, and weights go from the tile straight to the registers of one warp.
// Inputs:   x 16-bit or 8-bit codes, 16-byte aligned pixels; W, A, B, scales: parts of a prepared layer (layout.h).
// Numerics: 16-bit x: weights become code - zero in x's type, sums float32, scaled in float32. With scale groups and
//           more than 16 tokens the weights are scaled instead, in x's type.
//           8-bit x: int32 sums of products of integers, exact; scaled in float32. B sees t = x A^T rounded to x's type
//           (8-bit x: to tf32). Every sum has a fixed order: the same call gives the same bits.
// Method:   a block owns kBlockN channels x kBlockM tokens. A ring of kStages stages is filled by cp.async, one
//           commit a stage; waiting for all but kAhead - 1 and one barrier make the oldest stage readable and the
//           one read before it free. Rows of x are 128 bytes, their 16-byte chunks permuted by the row (see
//           chunk_of) so that neither the copies nor the reads conflict.
//           The adapter: `fused` computes t in the same loop from the same stages (the four warps along N share the
//           work: rank tile w % tiles, each its own share of the inputs); otherwise t comes in as partial sums of an
//           earlier pass. Then B t is ceil(r / 16) more steps on the same accumulators, before they are stored.
//           Tiles of warpgroups (sm_90a, 8-bit x): see multiply_by_warpgroups.
//           stream-K: where tiles of y do not fill the card evenly, blocks of threads share the stages of all tiles
//           evenly, whole tiles or parts. Who computes a part leaves its accumulators in `partial`; the last to arrive
//           at a tile adds them up in order. Nobody waits for anybody.
// Cost:     W once per kBlockM tokens, x once per kBlockN channels; see docs/cuda.md for bytes and occupancy.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/layout.h"
#include "cuda/platform.cuh"

#include <type_traits>

namespace cora::cuda {

struct Int8 {};  // x as unsigned 8-bit codes

/// How blocks of threads share the tiles of y. `each` 0: `splits` blocks a tile, each with its part of K; otherwise the
/// stages of all tiles stand in a row, and block w takes each + (w < more) of them.
struct Shares {
  int32_t stages;  // of a tile
  int32_t workers, splits, each, more;

  CORA_HOST_DEVICE int begin(int worker) const { return worker * each + (worker < more ? worker : more); }
  CORA_HOST_DEVICE int owner(int stage) const {
    const int longer = more * (each + 1);
    return stage < longer ? stage / (each + 1) : more + (stage - longer) / each;
  }
};

inline Shares split_tiles(int64_t tiles, int stages, int splits) {
  return {stages, static_cast<int32_t>(tiles * splits), splits, 0, 0};
}
/// workers <= tiles * stages < 2^31.
inline Shares share_tiles(int64_t tiles, int stages, int workers) {
  const auto all = static_cast<int32_t>(tiles * stages);
  return {stages, workers, 0, all / workers, all % workers};
}

struct GemmArgs {
  const char* x;
  int64_t x_item, x_row, x_pixel;  // strides in bytes; channels are contiguous
  int32_t height, width;           // of x: taps outside read zeros
  int32_t stride[2], padding[2], dilation[2], kernel_w;
  int32_t channels;  // of a pixel of x
  FastDivide pixels, out_w, run, taps_w, segment_blocks;
  Walk walk;
  int32_t m, n, panels;
  const uint8_t *w, *a, *b;
  const float2* qparams;
  const int32_t *sums, *a_sums;
  const float *adapter_scale, *bias;
  int32_t bits, rank_tiles;
  bool grouped;        // qparams and sums are by segment
  bool fused;          // t from this kernel
  const float* t;      // or from these partial sums [t_splits][m][16 rank_tiles]
  int32_t t_splits;
  const float* x_scale;    // 8-bit x: [items], items being images (tokens, for a matrix)
  const int32_t* x_zero;   // [items]
  int32_t x_parameters;    // items that have parameters of their own, or 1
  Shares shares;
  void* partial;           // [workers][2][kParts][threads], float or int32
  unsigned* tickets;       // [tiles of y], zero before the launch
  float* t_out;            // not null: this is the pass that computes t; x A^T goes to [splits][m][panels * 16]
  Epilogue epilogue;
};

// --- Weights in registers ---------------------------------------------------------------------------------------

/// A lane's codes of one tile, and their way to mma operands.
template <int kBits>
struct Codes {
  static constexpr int kWords = kBits;  // 32 codes
  uint32_t word[kWords];

  CORA_DEVICE void read(const char* tile, int lane) {
    if constexpr (kBits == 4) {
      set(load<uint4>(tile + lane * 16), 0);
    } else if constexpr (kBits == 8) {
      set(load<uint4>(tile + lane * 16), 0);
      set(load<uint4>(tile + 512 + lane * 16), 4);
    } else {
      const uint2 low = load<uint2>(tile + lane * 8);
      word[0] = low.x;
      word[1] = low.y;
      if constexpr (kBits == 3) word[2] = load<uint32_t>(tile + 256 + lane * 4);
    }
  }
  /// 8 bits: only the words of inputs 16j ..: registers for two, not eight.
  CORA_DEVICE void read_step(const char* tile, int lane, int j) {
    const uint2 v = load<uint2>(tile + j / 2 * 512 + lane * 16 + j % 2 * 8);
    word[4 * (j / 2) + 2 * (j % 2)] = v.x;
    word[4 * (j / 2) + 2 * (j % 2) + 1] = v.y;
  }
  CORA_DEVICE void set(uint4 v, int at) {
    word[at] = v.x;
    word[at + 1] = v.y;
    word[at + 2] = v.z;
    word[at + 3] = v.w;
  }

  /// Bytes of row half h at inputs 16j + 4t + (0, 2, 1, 3).
  CORA_DEVICE uint32_t bytes(int j, int h) const {
    if constexpr (kBits == 8) return word[4 * (j / 2) + 2 * (j % 2) + h];
    if constexpr (kBits == 4) return (word[j] >> (4 * h)) & 0x0f0f0f0fu;
    uint32_t v = (word[j / 2] >> (2 * (2 * (j % 2) + h))) & 0x03030303u;
    if constexpr (kBits == 3) v |= ((word[2] >> (2 * j + h)) & 0x01010101u) << 2;
    return v;
  }
};

/// code -> code - zero in T: an exponent is OR-ed over the code, which makes it kBase + code * 2^kShift, and one
/// fma takes both away. Row half h reads its codes where they lie, h fields up, so as not to shift them down
/// (Bfloat16 has too few digits for that with 4 bits).
template <typename T, int kBits>
struct Dequantize {
  static constexpr bool kHalf = std::is_same_v<T, Half>;
  static constexpr uint32_t kMagic = kHalf ? 0x64006400u : 0x43004300u;  // 1024, 128
  static constexpr int kField = kBits == 4 ? (kHalf ? 4 : 0) : kBits == 8 ? 0 : 2;

  static CORA_DEVICE float base(int h) { return (kHalf ? 1024.0f : 128.0f) / static_cast<float>(1 << (kField * h)); }
  static CORA_DEVICE uint32_t factor(int h) {
    const float f = 1.0f / static_cast<float>(1 << (kField * h));
    return pack2<T>(f, f);
  }

  /// The zero-point of a row as fma's addend. Half ends at 65504: a zero-point far beyond the codes is brought to
  /// 32768, and the scale takes the rest; what the codes then still add is below Half's precision of the weight.
  static CORA_DEVICE uint32_t zero(float& scale, float zero_point, int h) {
    if (kHalf && (zero_point > 32768.0f || zero_point < -32768.0f)) {
      const float limit = zero_point > 0 ? 32768.0f : -32768.0f;
      scale *= (zero_point > 0 ? zero_point : -zero_point) * (1.0f / 32768.0f);
      zero_point = limit;
    }
    const float c = -(base(h) + zero_point);
    return pack2<T>(c, c);
  }

  /// The operand of inputs 16j.. 16j + 15. zero: as above; zero_float: the plain zero-points (Bfloat16, 8 bits).
  static CORA_DEVICE void operand(const Codes<kBits>& codes, int j, const uint32_t (&zero)[2],
                                  const float (&zero_float)[2], uint32_t (&out)[4]) {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t v = 0;
        if constexpr (kBits == 8 && !kHalf) {
          // 255 needs eight digits: through float32, whose 2^23 takes the byte.
          const uint32_t w = codes.bytes(j, h);
          const float low = bits_to_float(byte_permute(w, 0x4b000000u, hi ? 0x7441u : 0x7440u));
          const float high = bits_to_float(byte_permute(w, 0x4b000000u, hi ? 0x7443u : 0x7442u));
          out[2 * hi + h] = pack2<T>(low - 8388608.0f - zero_float[h], high - 8388608.0f - zero_float[h]);
          continue;
        } else if constexpr (kBits == 8) {
          v = byte_permute(codes.bytes(j, h), 0x64646464u, hi ? 0x4341u : 0x4240u);
        } else if constexpr (kBits == 4) {
          const int down = 8 * hi + 4 * h - kField * h;
          v = and_or(codes.word[j] >> down, 0x000f000fu << (kField * h), kMagic);
        } else {
          v = and_or(codes.word[j / 2] >> (8 * hi + 4 * (j % 2)), 0x00030003u << (2 * h), kMagic);
          if constexpr (kBits == 3) {
            const int down = 8 * hi + 2 * j + h - (2 * h + 2);
            const uint32_t high = down >= 0 ? codes.word[2] >> (down & 31) : codes.word[2] << (-down & 31);
            v = and_or(high, 0x00040004u << (2 * h), v);
          }
        }
        out[2 * hi + h] = fma2<T>(v, factor(h), zero[h]);
      }
  }
};

/// Bytes code - zero, two's complement, of unsigned codes; zero replicated four times.
template <int kBits>
CORA_DEVICE uint32_t subtract_bytes(uint32_t codes, uint32_t zero) {
  constexpr uint32_t kTop = 0x80808080u;
  if constexpr (kBits < 8)
    return ((codes | kTop) - zero) ^ kTop;  // 128 + code - zero is 0..255: no byte borrows
  else
    return ((codes | kTop) - (zero & ~kTop)) ^ ((codes ^ ~zero) & kTop);
}

/// Adapter codes (stored + 128) as a 16-bit operand.
template <typename T>
CORA_DEVICE void adapter_operand(const Codes<8>& codes, int step, uint32_t (&out)[4]) {
  const float zero_float[2] = {128.0f, 128.0f};
  float one = 1.0f;
  const uint32_t zero[2] = {Dequantize<T, 8>::zero(one, 128.0f, 0), Dequantize<T, 8>::zero(one, 128.0f, 1)};
  Dequantize<T, 8>::operand(codes, step, zero, zero_float, out);
}

/// Scale and zero-point of a lane's two rows of a tile, in the form the operands take them.
template <typename C>
struct RowParameters {
  float scale[2], zero_float[2];
  uint32_t zero[2], scale16[2];

  /// Int8: what nearest_zero leaves over of the zero-point; the rest of q is wanted only after the loop.
  CORA_DEVICE int set(int h, float2 q, int bits) {
    if constexpr (C::kInt8) {
      const int near = nearest_zero(static_cast<int>(q.y), bits);
      zero[h] = static_cast<uint32_t>(C::kBits == 8 ? near & 0xff : near) * 0x01010101u;
      return near - static_cast<int>(q.y);
    } else {
      scale[h] = q.x;
      zero_float[h] = q.y;
      zero[h] = Dequantize<typename C::T, C::kBits>::zero(scale[h], q.y, h);
      scale16[h] = pack2<typename C::T>(scale[h], scale[h]);
      return 0;
    }
  }

  CORA_DEVICE void operand(const Codes<C::kBits>& codes, int step, bool scaled, uint32_t (&out)[4]) const {
    if constexpr (C::kInt8) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
        out[r] = subtract_bytes<C::kBits>(codes.bytes(2 * step + r / 2, r % 2), zero[r % 2]);
    } else {
      Dequantize<typename C::T, C::kBits>::operand(codes, step, zero, zero_float, out);
      if (scaled) {
#pragma unroll
        for (int r = 0; r < 4; ++r) out[r] = fma2<typename C::T>(out[r], scale16[r % 2], 0x80008000u);
      }
    }
  }
};

// --- The tile a block computes ----------------------------------------------------------------------------------

/// kWarpsN x kWarpsM warps, each kRows tiles of 16 channels x kCols of 8 tokens; kDepth: 128-byte pieces of an x row
/// a stage; kGrouped: the weight has scale groups (8-bit x pays registers for it, 16-bit x nothing); kWarpgroup: by
/// warpgroup instructions.
template <typename T_, int kBits_, int kWarpsN_, int kWarpsM_, int kRows_, int kCols_, int kDepth_, int kStages_,
          bool kGrouped_ = true, bool kWarpgroup_ = false>
struct Config {
  using T = T_;
  static constexpr bool kInt8 = std::is_same_v<T, Int8>, kGrouped = kGrouped_;
  static constexpr int kBits = kBits_, kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kRows = kRows_, kCols = kCols_;
  static constexpr int kDepth = kDepth_, kStages = kStages_;
  static constexpr bool kWarpgroup = kWarpgroup_;
  static_assert(!kWarpgroup || (kInt8 && !kGrouped && kWarpsN % 4 == 0 && kWarpsM == 1 && kRows == 1 && kCols == 16));
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM;
  static constexpr int kBlockN = 16 * kWarpsN * kRows, kBlockM = 8 * kWarpsM * kCols;
  static constexpr int kPanels = kBlockN / kTileRows;
  static constexpr int kTilesPerPiece = kInt8 ? 2 : 1;        // tiles along K in 128 bytes of x
  static constexpr int kTilesK = kDepth * kTilesPerPiece;     // ... in a stage
  /// Stages under way: one less than the ring has while one is read; warpgroups may still read the one before it.
  static constexpr int kAhead = kStages - (kWarpgroup ? 2 : 1);
  /// Whether an adapter may be fused: not where few tokens of 16-bit x leave the call bound by bytes (see plan).
  static constexpr bool kFuses = kInt8 || kBlockM >= 128;
  /// A fused adapter's accumulators of a warp: kRankParts x 1 x kRankCols tiles.
  static constexpr int kRankParts = kWarpgroup ? 4 : 1, kRankCols = kWarpgroup ? 2 : kFuses ? kCols : 1;
  /// Scale groups of 16-bit x: with few tokens the sums of a tile are scaled, else its weights, whichever are fewer.
  static constexpr bool kScaleSums = !kInt8 && kRows * kCols * 4 < kRows * 16;
  /// What a thread, and a block, leaves of a part of a tile: accumulators, with 8-bit x the sums of x, a fused t.
  static constexpr int kAcc = kRows * kCols * 4, kSums = kInt8 ? kCols : 0;
  static constexpr int kAccT = kFuses ? kRankParts * kRankCols * 4 : 0;
  static constexpr int kParts = kAcc + kSums + kAccT, kPartials = kParts * kThreads;
  static constexpr int kChunkInputs = kInt8 ? 16 : 8;         // inputs in 16 bytes of x
  static constexpr int kTileBytes = kTileRows * kTileInputs / 8 * kBits;
  // A stage: x pieces, weight tiles, scales, adapter tiles.
  static constexpr int kPieceBytes = kBlockM * 128;
  static constexpr int kWeightAt = kDepth * kPieceBytes;
  static constexpr int kScaleAt = kWeightAt + kTilesK * kPanels * kTileBytes;
  static constexpr int kAdapterAt = kScaleAt + (kGrouped ? kTilesK * kBlockN * 8 : 0);
  static int stage_bytes(int fused_tiles) { return kAdapterAt + kTilesK * fused_tiles * 1024; }
  // After the loop the ring becomes t (float32 parts, then the operand) and then the tile of y.
  static constexpr int kOutPitch = kBlockN + 4;  // floats
  static int shared_bytes(int rank_tiles, bool fused) {
    const int ring = kStages * stage_bytes(fused ? rank_tiles : 0);
    const int parts = fused ? t_parts(rank_tiles) * kBlockM * 16 * 4 : 0;
    const int t = rank_tiles == 0 ? 0 : kBlockM * t_pitch(rank_tiles) + parts;
    const int y = kBlockM * kOutPitch * 4;
    return ring > t ? (ring > y ? ring : y) : (t > y ? t : y);
  }
  /// Bytes of a token's t: 16 more than needed, so that 8 tokens lie in different banks.
  CORA_HOST_DEVICE static int t_pitch(int rank_tiles) { return rank_tiles * 16 * (kInt8 ? 4 : 2) + 16; }
  /// Parts [token][16] that a fused t comes in: part i is of rank tile i % rank_tiles.
  CORA_HOST_DEVICE static int t_parts(int rank_tiles) { return kWarpgroup ? rank_tiles : kWarpsN; }
};

/// Position of 16-byte chunk `chunk` (0..7) of a row of x in shared memory. 16-bit x is read as 8 bytes a lane, half a
/// warp at a time: 4 rows x 2 neighbouring chunks; 8-bit x by ldmatrix: 8 rows x 1 chunk.
template <typename C>
CORA_DEVICE int chunk_of(int row, int chunk) {
  return C::kInt8 ? chunk ^ (row & 7) : chunk ^ ((row & 3) << 1);
}

template <typename C>
struct Block {
  static constexpr int kLoadRows = C::kBlockM * 8 / C::kThreads > 0 ? C::kBlockM * 8 / C::kThreads : 1;
  using Acc = std::conditional_t<C::kInt8, int32_t, float>;

  const GemmArgs& p;
  char* shared;
  int tid, lane, group, quad, warp_n, warp_m;
  int first_panel, first_token, end_block;
  // Rows of x this thread copies: where their window begins.
  const char* row[kLoadRows];
  int row_y[kLoadRows], row_x[kLoadRows];

  CORA_DEVICE Block(const GemmArgs& args, int panel, int token, int end)
      : p(args), shared(shared_memory()), first_panel(panel), first_token(token), end_block(end) {
    tid = reread_thread_index();
    lane = tid % 32;
    group = lane / 4;
    quad = lane % 4;
    warp_n = tid / 32 % C::kWarpsN;
    warp_m = tid / 32 / C::kWarpsN;
#pragma unroll
    for (int i = 0; i < kLoadRows; ++i) {
      const int m = first_token + tid / 8 + i * (C::kThreads / 8);
      const uint32_t item = quotient(static_cast<uint32_t>(m), p.pixels);
      const uint32_t pixel = static_cast<uint32_t>(m) - item * p.pixels.divisor;
      const uint32_t y = quotient(pixel, p.out_w), x = pixel - y * p.out_w.divisor;
      row_y[i] = static_cast<int>(y) * p.stride[0] - p.padding[0];
      row_x[i] = static_cast<int>(x) * p.stride[1] - p.padding[1];
      row[i] = p.x + static_cast<int64_t>(item) * p.x_item + row_y[i] * p.x_row + row_x[i] * p.x_pixel;
      if (m >= p.m) row_y[i] = -(1 << 24);  // outside whatever the tap
    }
  }

  /// Which of x's parameters belong to a token of the block.
  CORA_DEVICE int item_of(int token) const {
    const int m = first_token + token < p.m ? first_token + token : p.m - 1;
    return p.x_parameters == 1 ? 0 : static_cast<int>(quotient(static_cast<uint32_t>(m), p.pixels));
  }

  /// (scale, zero-point) of this lane's row `group + 8 h` of tile `tile` of the block.
  CORA_DEVICE float2 qparams_of(int segment, int tile, int h) const {
    const int64_t panel = first_panel + tile;
    if (panel >= p.panels) return float2{0.0f, 0.0f};
    return load<float2>(p.qparams + (segment * static_cast<int64_t>(p.panels) + panel) * kTileRows + group + 8 * h);
  }

  /// Copies tiles `block` .. of K to a stage.
  CORA_DEVICE void copy_stage(int block, char* stage) {
    if (tid < C::kBlockM * 8) {
      const int chunk = tid % 8;
#pragma unroll
      for (int piece = 0; piece < C::kDepth; ++piece) {
        const int kb = block + piece * C::kTilesPerPiece + (C::kInt8 ? chunk / 4 : 0);
        const int segment = C::kGrouped ? static_cast<int>(quotient(static_cast<uint32_t>(kb), p.segment_blocks)) : 0;
        const int in_tile = (C::kInt8 ? chunk % 4 : chunk) * C::kChunkInputs;
        const uint32_t k = static_cast<uint32_t>((kb - segment * p.walk.blocks_per_segment) * kTileInputs + in_tile);
        const int tap = static_cast<int>(quotient(k, p.run)), channel = static_cast<int>(k) - tap * p.walk.run;
        const int tap_y = static_cast<int>(quotient(static_cast<uint32_t>(tap), p.taps_w));
        const int dy = tap_y * p.dilation[0], dx = (tap - tap_y * p.kernel_w) * p.dilation[1];
        const bool inside = kb < end_block && tap < p.walk.taps && channel < p.walk.segment_channels;
        const int64_t offset = dy * p.x_row + dx * p.x_pixel +
                               static_cast<int64_t>(segment * p.walk.segment_channels + channel) * (C::kInt8 ? 1 : 2);
#pragma unroll
        for (int i = 0; i < kLoadRows; ++i) {
          const int r = tid / 8 + i * (C::kThreads / 8);
          const bool valid = inside && static_cast<unsigned>(row_y[i] + dy) < static_cast<unsigned>(p.height) &&
                             static_cast<unsigned>(row_x[i] + dx) < static_cast<unsigned>(p.width);
          async_copy16(stage + piece * C::kPieceBytes + r * 128 + chunk_of<C>(r, chunk) * 16,
                       row[i] + offset, valid);
        }
      }
    }
    // Weight tiles of a block of K lie one after the other. What lies beyond the weight is not copied: its rows are not
    // stored, its steps not made.
    constexpr int kChunks = C::kPanels * C::kTileBytes / 16;
    const int panels = p.panels - first_panel < C::kPanels ? p.panels - first_panel : C::kPanels;
#pragma unroll
    for (int tile = 0; tile < C::kTilesK; ++tile) {
      const int kb = block + tile;
      if (kb >= end_block) break;
      // No GPU holds 2^31 tiles: one multiplication makes the address.
      const auto first = static_cast<uint32_t>(kb * p.panels + first_panel);
      const uint8_t* const w = p.w + uint64_t{first} * C::kTileBytes + tid * 16;
#pragma unroll
      for (int i = 0; i < kChunks; i += C::kThreads)
        if (i + tid < panels * (C::kTileBytes / 16))
          async_copy16(stage + C::kWeightAt + tile * C::kPanels * C::kTileBytes + (i + tid) * 16, w + i * 16);
      if (C::kGrouped && p.grouped && tid < panels * 8) {
        const uint32_t segment = quotient(static_cast<uint32_t>(kb), p.segment_blocks);
        const float2* const q = p.qparams + uint64_t{segment * p.panels + first_panel} * kTileRows + tid * 2;
        async_copy16(stage + C::kScaleAt + tile * C::kBlockN * 8 + tid * 16, q);
      }
      if constexpr (C::kFuses) {
        const int chunks = p.rank_tiles * 64;
        if (p.fused)
#pragma unroll 1  // one round: four rank tiles at most
          for (int i = tid; i < chunks; i += C::kThreads)
            async_copy16(stage + C::kAdapterAt + (tile * chunks + i) * 16,
                         p.a + uint64_t{static_cast<uint32_t>(kb * chunks + i)} * 16);
      }
    }
  }

  /// Waits for stage `stage` of the ring, which holds tiles k .. of K, and sets the copy of the tiles kAhead stages
  /// later going: to the place that was read last, or by warpgroups the time before.
  CORA_DEVICE const char* next_stage(int k, int stage, int stage_bytes) {
    async_wait<C::kAhead - 1>();
    if constexpr (C::kWarpgroup) warpgroup_publish();
    block_sync();
    const int free = stage + C::kAhead - (stage + C::kAhead >= C::kStages ? C::kStages : 0);
    const int ahead = k + C::kAhead * C::kTilesK;
    if (ahead < end_block) copy_stage(ahead, shared + free * stage_bytes);
    async_commit();
    return shared + stage * stage_bytes;
  }

  /// x operands of 16 (Int8: 32) inputs: step `step` of tile `tile` of the stage.
  CORA_DEVICE void read_x(const char* stage, int tile, int step, uint32_t (&out)[C::kCols][2]) const {
    const int first = warp_m * C::kCols * 8;
    if constexpr (C::kInt8) {
#pragma unroll
      for (int c = 0; c < C::kCols; c += 2) {
        uint32_t pair[2][2];
        read_pair(stage, tile, step, first + c * 8, pair);
#pragma unroll
        for (int i = 0; i < 4; ++i) out[c + i / 2][i % 2] = pair[i / 2][i % 2];
      }
    } else {
#pragma unroll
      for (int c = 0; c < C::kCols; ++c) {
        const int r = first + c * 8 + group;
        const uint2 v = load<uint2>(stage + tile * C::kPieceBytes + r * 128 +
                                    chunk_of<C>(r, step * 2 + quad / 2) * 16 + quad % 2 * 8);
        out[c][0] = v.x;
        out[c][1] = v.y;
      }
    }
  }

  /// Int8: the same of 16 tokens from `first` on.
  CORA_DEVICE void read_pair(const char* stage, int tile, int step, int first, uint32_t (&out)[2][2]) const {
    const int r = first + lane / 16 * 8 + lane % 8, chunk = tile % 2 * 4 + step * 2 + lane / 8 % 2;
    uint32_t v[4];
    load_matrices(v, stage + tile / 2 * C::kPieceBytes + r * 128 + chunk_of<C>(r, chunk) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i / 2][i % 2] = byte_permute(v[i], 0, 0x3120u);
  }

  /// Int8: a register of adapter codes (stored + 128) as signed bytes.
  CORA_DEVICE static void adapter_bytes(const Codes<8>& codes, int step, uint32_t (&out)[1][4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) out[0][r] = codes.bytes(2 * step + r / 2, r % 2) ^ 0x80808080u;
  }
};

/// Int8: adds the bytes of a token's inputs to its sum.
CORA_DEVICE int32_t add_bytes(const uint32_t (&x)[2], int32_t sum) {
  return dot4_unsigned(x[0], 0x01010101u, dot4_unsigned(x[1], 0x01010101u, sum));
}

// --- The loop over K -----------------------------------------------------------------------------------------------

/// By the instructions that every GPU has: a warp multiplies kRows x kCols tiles. end_segment(i) is called after the
/// last tile of scale group i (8-bit x).
template <typename C, typename EndSegment>
CORA_DEVICE void multiply_by_warps(Block<C>& block, RowParameters<C> (&rows)[C::kRows], int begin, int end,
                                   int stage_bytes, int fused_tiles, bool segmented, bool sum_x,
                                   typename Block<C>::Acc (&acc)[C::kRows][C::kCols][4],
                                   typename Block<C>::Acc (&acc_t)[C::kRankParts][1][C::kRankCols][4],
                                   int32_t (&x_sum)[C::kCols], const EndSegment& end_segment) {
  using T = typename C::T;
  constexpr int kSteps = C::kInt8 ? 2 : 4;  // mma steps of a tile along K
  const int lane = block.lane, group = block.group, warp_n = block.warp_n;
  // Fused tiles are 1, 2 or 4; the warps that share one take its steps in turn.
  const int shift = fused_tiles / 2, turns = C::kWarpsN >> shift, turn = warp_n >> shift;
  const int rank_tile_at = C::kAdapterAt + (warp_n - (turn << shift)) * 1024;
  [[maybe_unused]] float scaled[C::kRows][C::kCols][4] = {};  // kScaleSums: the sum of the tiles so far
  int stage = 0, segment = 0, segment_end = begin + block.p.walk.blocks_per_segment;
  for (int k = begin; k < end; k += C::kTilesK) {
    const char* const from = block.next_stage(k, stage, stage_bytes);
#pragma unroll
    for (int tile = 0; tile < C::kTilesK; ++tile) {
      if (k + tile >= end) break;
      Codes<C::kBits> codes[C::kRows];
#pragma unroll
      for (int i = 0; i < C::kRows; ++i) {
        codes[i].read(from + C::kWeightAt + (tile * C::kPanels + warp_n * C::kRows + i) * C::kTileBytes, lane);
        if (segmented)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            rows[i].set(h, load<float2>(from + C::kScaleAt + tile * C::kBlockN * 8 +
                                        ((warp_n * C::kRows + i) * kTileRows + group + 8 * h) * 8), block.p.bits);
      }
      const char* const rank_tile = from + rank_tile_at + tile * fused_tiles * 1024;
      [[maybe_unused]] Codes<8> rank_codes;
      if constexpr (C::kInt8) {
        if (fused_tiles > 0) rank_codes.read(rank_tile, lane);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t x[C::kCols][2], w[C::kRows][4];
        block.read_x(from, tile, step, x);
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) rows[i].operand(codes[i], step, segmented && !C::kScaleSums, w[i]);
        if constexpr (C::kInt8) {
          mma8(acc, w, x);
          if (sum_x)
#pragma unroll
            for (int j = 0; j < C::kCols; ++j) x_sum[j] = add_bytes(x[j], x_sum[j]);
        } else {
          mma16<T>(acc, w, x);
        }
        if constexpr (C::kFuses) {
          if (fused_tiles > 0 && ((tile * kSteps + step) & (turns - 1)) == turn) {
            uint32_t a[1][4];
            if constexpr (C::kInt8) {
              block.adapter_bytes(rank_codes, step, a);
              mma8(acc_t[0], a, x);
            } else {
              Codes<8> step_codes;
              step_codes.read_step(rank_tile, lane, step);
              adapter_operand<T>(step_codes, step, a[0]);
              mma16<T>(acc_t[0], a, x);
            }
          }
        }
      }
      if constexpr (C::kScaleSums) {
        if (segmented) {
#pragma unroll
          for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int j = 0; j < C::kCols; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                scaled[i][j][e] = fused_multiply_add(acc[i][j][e], rows[i].scale[e / 2], scaled[i][j][e]);
                acc[i][j][e] = 0;
              }
        }
      }
      if (C::kInt8 && segmented && k + tile + 1 == segment_end) {
        end_segment(segment++);
        segment_end += block.p.walk.blocks_per_segment;
      }
    }
    stage = stage == C::kStages - 1 ? 0 : stage + 1;
  }
  if constexpr (C::kScaleSums) {
    if (segmented)
#pragma unroll
      for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int j = 0; j < C::kCols; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] = scaled[i][j][e];
  }
}

/// Hopper's own instructions: weights from registers as ever, 64 channels a warpgroup; x from shared memory, whose rows
/// lie as the instructions want them (chunk_of is the 128-byte swizzle). They run on while the next weights are
/// dequantized: two sets of weight registers, one instruction left under way. A stage is overwritten two rounds after it
/// was read, when every warp has waited for its instructions.
/// t of a fused adapter: by the warps' own tensor-core instructions meanwhile; a warp takes rank tile warp % tiles and
/// its share of the tokens, which fills 16 rows where a warpgroup would have to fill 64.
template <typename C>
CORA_DEVICE void multiply_by_warpgroups(Block<C>& block, const RowParameters<C>& row, int begin, int end,
                                        int stage_bytes, int fused_tiles, bool sum_x, int32_t (&acc)[1][C::kCols][4],
                                        int32_t (&acc_t)[C::kRankParts][1][C::kRankCols][4],
                                        int32_t (&x_sum)[C::kCols]) {
  const int lane = block.lane, warp = block.warp_n;
  const int rank_tile = warp & (fused_tiles - 1), rank_token = (warp - rank_tile) * 16;  // of 1, 2 or 4; 128 tokens
  uint32_t w[2][4];
  int stage = 0;
  for (int k = begin; k < end; k += C::kTilesK) {
    const char* const from = block.next_stage(k, stage, stage_bytes);
    // No branch between these: the assembler would have each instruction wait for the one before. Tiles beyond the end
    // of K hold zeros for x, and anything for the weights.
#pragma unroll
    for (int tile = 0; tile < C::kTilesK; ++tile) {
      Codes<C::kBits> codes;
      codes.read(from + C::kWeightAt + (tile * C::kPanels + warp) * C::kTileBytes, lane);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        warpgroup_wait<1>();  // the instruction before the last: its weights were in w[step]
        row.operand(codes, step, false, w[step]);
#pragma unroll
        for (int r = 0; r < 4; ++r) w[step][r] = byte_permute(w[step][r], 0, 0x3120u);  // to the order of x in memory
        warpgroup_mma8(acc, w[step], from + tile / 2 * C::kPieceBytes + (tile % 2 * 2 + step) * 32);
      }
    }
    if (fused_tiles > 0)
#pragma unroll
      for (int tile = 0; tile < C::kTilesK; ++tile) {
        if (k + tile >= end) break;
        Codes<8> rank_codes;
        rank_codes.read(from + C::kAdapterAt + (tile * fused_tiles + rank_tile) * 1024, lane);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t a[1][4];
          block.adapter_bytes(rank_codes, step, a);
#pragma unroll
          for (int part = 0; part < C::kRankParts; ++part)
            if (part < fused_tiles) {
              uint32_t x[2][2];
              block.read_pair(from, tile, step, rank_token + part * 16, x);
              mma8(acc_t[part], a, x);
            }
        }
      }
    if (sum_x)
#pragma unroll
      for (int tile = 0; tile < C::kTilesK; ++tile)
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int j = 0; j < C::kCols; j += 2) {
            uint32_t x[2][2];
            block.read_pair(from, tile, step, j * 8, x);
            x_sum[j] = add_bytes(x[0], x_sum[j]);
            x_sum[j + 1] = add_bytes(x[1], x_sum[j + 1]);
          }
    stage = stage == C::kStages - 1 ? 0 : stage + 1;
  }
  warpgroup_wait<0>();
#pragma unroll
  for (int j = 0; j < C::kCols; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) warpgroup_settle(acc[0][j][e]);
}

// --- Storing -------------------------------------------------------------------------------------------------------

/// The tile of y, float32 [token][channel] in shared memory, to its place; whole 16-byte pieces where y lets us.
template <typename C>
CORA_DEVICE void store_tile(const GemmArgs& p, const float* y, int first_panel, int first_token) {
  const Epilogue& e = p.epilogue;
  const int tid = reread_thread_index(), first_n = first_panel * kTileRows;
  const int tokens = p.m - first_token < C::kBlockM ? p.m - first_token : C::kBlockM;
  const int channels = p.n - first_n < C::kBlockN ? p.n - first_n : C::kBlockN;
  const auto offsets = [&](int token, const PixelStrides& s) {
    const uint32_t m = static_cast<uint32_t>(first_token + token), item = quotient(m, p.pixels);
    const uint32_t pixel = m - item * p.pixels.divisor, row = quotient(pixel, p.out_w);
    return item * s.item + row * s.row + (pixel - row * p.out_w.divisor) * s.pixel;
  };
  const bool wide = e.add == nullptr && (e.out_type == kFloat16 || e.out_type == kBfloat16) &&
                    e.out_strides.channel == 1 && e.out_strides.pixel % 8 == 0 && e.out_strides.row % 8 == 0 &&
                    e.out_strides.item % 8 == 0 && reinterpret_cast<uintptr_t>(e.out) % 16 == 0 && p.n % 8 == 0;
  if (wide) {
    for (int i = tid; i < tokens * (C::kBlockN / 8); i += C::kThreads) {
      const int token = i / (C::kBlockN / 8), n = i % (C::kBlockN / 8) * 8;
      if (n >= channels) continue;
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 sum = load<float4>(y + token * C::kOutPitch + n + j);
        const float4 bias = load<float4>(p.bias + first_n + n + j);
        const float f[4] = {sum.x + bias.x, sum.y + bias.y, sum.z + bias.z, sum.w + bias.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[j + i] = f[i] < e.low ? e.low : f[i];
          v[j + i] = v[j + i] > e.high ? e.high : v[j + i];
        }
      }
      store(static_cast<uint16_t*>(e.out) + offsets(token, e.out_strides) + first_n + n, pack8(v, e.out_type));
    }
    return;
  }
  // Neighbouring threads take neighbouring elements of y: channels, or pixels if those are adjacent.
  const bool by_channel = e.out_strides.channel == 1;
  for (int i = tid; i < C::kBlockM * C::kBlockN; i += C::kThreads) {
    const int token = by_channel ? i / C::kBlockN : i % C::kBlockM, n = by_channel ? i % C::kBlockN : i / C::kBlockM;
    if (token >= tokens || n >= channels) continue;
    const int64_t add = e.add == nullptr ? 0 : offsets(token, e.add_strides) + (first_n + n) * e.add_strides.channel;
    finish_element(e, y[token * C::kOutPitch + n] + p.bias[first_n + n],
                   offsets(token, e.out_strides) + (first_n + n) * e.out_strides.channel, add);
  }
}

// --- The kernel ----------------------------------------------------------------------------------------------------

/// Stages begin .. end - 1 of a tile of y.
struct Piece {
  int tile, begin, end;
};

template <typename C>
CORA_DEVICE void compute(const GemmArgs& p, const Piece& piece) {
  using T = typename C::T;
  using Acc = typename Block<C>::Acc;
  const int n_blocks = (p.panels + C::kPanels - 1) / C::kPanels;
  const int first_panel = piece.tile % n_blocks * C::kPanels;
  const int first_token = piece.tile / n_blocks * C::kBlockM;
  const bool fused = C::kFuses && p.fused;
  const int fused_tiles = fused ? p.rank_tiles : 0;
  const int stage_bytes = C::kAdapterAt + C::kTilesK * fused_tiles * 1024;
  const int begin = piece.begin * C::kTilesK;
  const int end = piece.end == p.shares.stages ? p.walk.blocks() : piece.end * C::kTilesK;
  const bool segmented = C::kGrouped && p.grouped;

  Block<C> block(p, first_panel, first_token, end);
  const int lane = block.lane, group = block.group, quad = block.quad;
  const int warp_n = block.warp_n, warp_m = block.warp_m;
  char* const shared = block.shared;
  const auto panel_of = [&](int i) { return first_panel + warp_n * C::kRows + i; };
  const auto token_of = [&](int j, int e) { return (warp_m * C::kCols + j) * 8 + quad * 2 + e; };  // within the block

#pragma unroll 1
  for (int s = 0; s < C::kAhead; ++s) {
    if (begin + s * C::kTilesK < end) block.copy_stage(begin + s * C::kTilesK, shared + s * stage_bytes);
    async_commit();
  }

  Acc acc[C::kRows][C::kCols][4] = {};
  Acc acc_t[C::kRankParts][1][C::kRankCols][4] = {};  // fused: this warp's rank tile over its share of K, or of tokens
  float total[C::kRows][C::kCols][4] = {};    // Int8: the scaled sums of the segments so far
  int32_t x_sum[C::kCols] = {};               // Int8: sum of x over the segment; this lane's part of token `group`
  RowParameters<C> rows[C::kRows];
  bool sum_x = C::kInt8 && segmented;
  if (!segmented) {
    int left_over = 0;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) left_over |= rows[i].set(h, block.qparams_of(0, warp_n * C::kRows + i, h), p.bits);
    if constexpr (C::kInt8) {
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) left_over |= shuffle_xor(left_over, mask);
      sum_x = left_over != 0;
    }
  }

  /// Int8: the integers of a segment, sum of (x - zero_x) (code - zero), times its scale, onto `total`.
  [[maybe_unused]] const auto end_segment = [&](int segment) {
    if constexpr (C::kInt8) {
      const int32_t count = p.walk.taps * p.walk.segment_channels;
      float scale[C::kRows][2];
      int32_t left_over[C::kRows][2], sums[C::kRows][2];
#pragma unroll
      for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 q = block.qparams_of(segment, warp_n * C::kRows + i, h);
          RowParameters<C> row;
          scale[i][h] = q.x;
          left_over[i][h] = row.set(h, q, p.bits);
          const int64_t at = (static_cast<int64_t>(segment) * p.panels + panel_of(i)) * kTileRows + group + 8 * h;
          sums[i][h] = panel_of(i) < p.panels ? load<int32_t>(p.sums + at) : 0;
        }
#pragma unroll
      for (int j = 0; j < C::kCols; ++j) {
        int32_t part = x_sum[j];
        part += shuffle_xor(part, 1);
        part += shuffle_xor(part, 2);
        x_sum[j] = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int32_t zero_x = p.x_zero[block.item_of(token_of(j, e))];
          const int32_t sum = shuffle(part, 4 * (2 * quad + e)) - zero_x * count;  // of x - zero_x
#pragma unroll
          for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int32_t near = acc[i][j][2 * h + e] - zero_x * sums[i][h];
              const float scaled =
                  scale[i][h] * (sum_x ? static_cast<float>(near + static_cast<int64_t>(left_over[i][h]) * sum)
                                       : static_cast<float>(near));
              total[i][j][2 * h + e] = C::kGrouped ? total[i][j][2 * h + e] + scaled : scaled;
              acc[i][j][2 * h + e] = 0;
            }
        }
      }
    }
  };

  // --- The loop over K ---
  if constexpr (C::kWarpgroup)
    multiply_by_warpgroups<C>(block, rows[0], begin, end, stage_bytes, fused_tiles, sum_x, acc, acc_t, x_sum);
  else
    multiply_by_warps<C>(block, rows, begin, end, stage_bytes, fused_tiles, segmented, sum_x, acc, acc_t, x_sum,
                         end_segment);
  async_wait<0>();
  block_sync();  // from here on the ring is free

  // --- A part of the sum: accumulators meet in global memory; whoever comes last adds them up and goes on ---
  if (p.t_out == nullptr && (piece.begin > 0 || piece.end < p.shares.stages)) {
    const int first = p.shares.owner(piece.tile * p.shares.stages);
    const int last = p.shares.owner((piece.tile + 1) * p.shares.stages - 1);
    // A block has at most two parts of tiles: of the one it begins in, and, as its first owner, of the one it ends in.
    const auto partial = [&](int worker) {
      return static_cast<Acc*>(p.partial) + (2 * static_cast<int64_t>(worker) + (worker == first)) * C::kPartials +
             block.tid;
    };
    Acc* const mine = partial(static_cast<int>(blockIdx.x));
#pragma unroll
    for (int i = 0; i < C::kAcc; ++i)
      store(mine + i * C::kThreads, acc[i / (C::kCols * 4)][i / 4 % C::kCols][i % 4]);
#pragma unroll
    for (int j = 0; j < C::kSums; ++j) store(mine + (C::kAcc + j) * C::kThreads, static_cast<Acc>(x_sum[j]));
    if (fused)
#pragma unroll
      for (int i = 0; i < C::kAccT; ++i)
        store(mine + (C::kAcc + C::kSums + i) * C::kThreads,
              acc_t[i / (C::kRankCols * 4)][0][i / 4 % C::kRankCols][i % 4]);
    block_sync();
    unsigned* const ticket = reinterpret_cast<unsigned*>(shared);
    if (block.tid == 0) {
      // After the barrier, so that it orders every thread's writes before the ticket; and before the next one, so that
      // it orders the ticket before every thread's reads.
      device_fence();
      *ticket = atomic_add(p.tickets + piece.tile, 1u);
      device_fence();
    }
    block_sync();
    const bool is_last = *ticket == static_cast<unsigned>(last - first);
    if (!is_last) return;
    block_sync();  // everyone has read the ticket
#pragma unroll
    for (int i = 0; i < C::kAcc; ++i) acc[i / (C::kCols * 4)][i / 4 % C::kCols][i % 4] = 0;
#pragma unroll
    for (int j = 0; j < C::kSums; ++j) x_sum[j] = 0;
#pragma unroll
    for (int i = 0; i < C::kAccT; ++i) acc_t[i / (C::kRankCols * 4)][0][i / 4 % C::kRankCols][i % 4] = 0;
#pragma unroll 1
    for (int worker = first; worker <= last; ++worker) {
      const Acc* const part = partial(worker);
#pragma unroll
      for (int i = 0; i < C::kAcc; ++i)
        acc[i / (C::kCols * 4)][i / 4 % C::kCols][i % 4] += load_other_blocks(part + i * C::kThreads);
#pragma unroll
      for (int j = 0; j < C::kSums; ++j)
        x_sum[j] += static_cast<int32_t>(load_other_blocks(part + (C::kAcc + j) * C::kThreads));
      if (fused)
#pragma unroll
        for (int i = 0; i < C::kAccT; ++i)
          acc_t[i / (C::kRankCols * 4)][0][i / 4 % C::kRankCols][i % 4] +=
              load_other_blocks(part + (C::kAcc + C::kSums + i) * C::kThreads);
    }
  }

  if constexpr (C::kInt8) {
    if (!segmented) end_segment(0);
  }

  // --- x A^T of an earlier pass: its job ends here ---
  if (p.t_out != nullptr) {
    const int split = static_cast<int>(blockIdx.x) % p.shares.splits, ranks = p.panels * kTileRows;
    float* const t_out = p.t_out + static_cast<int64_t>(split) * p.m * ranks;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
      for (int j = 0; j < C::kCols; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = first_token + token_of(j, e % 2), r = panel_of(i) * kTileRows + group + 8 * (e / 2);
          if (m < p.m && panel_of(i) < p.panels)
            store(t_out + static_cast<int64_t>(m) * ranks + r,
                  C::kInt8 ? total[i][j][e] : static_cast<float>(acc[i][j][e]));
        }
    return;
  }

  // --- Scale ---
  float y[C::kRows][C::kCols][4];
#pragma unroll
  for (int i = 0; i < C::kRows; ++i)
#pragma unroll
    for (int j = 0; j < C::kCols; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (C::kInt8)
          y[i][j][e] = total[i][j][e] * p.x_scale[block.item_of(token_of(j, e % 2))];
        else
          y[i][j][e] = segmented ? acc[i][j][e] : acc[i][j][e] * rows[i].scale[e / 2];
      }

  // --- The adapter: t to shared memory, then ceil(r / 16) more steps ---
  if (p.rank_tiles > 0) {
    const int pitch = C::t_pitch(p.rank_tiles), ranks = p.rank_tiles * 16;
    Acc* const parts = reinterpret_cast<Acc*>(shared + C::kBlockM * pitch);  // [t_parts][token][16]
    if (fused) {
      const int part = C::kWarpgroup ? warp_n & (fused_tiles - 1) : warp_n;
      const int first = C::kWarpgroup ? (warp_n - part) * 16 : warp_m * C::kCols * 8;
#pragma unroll
      for (int j = 0; j < C::kRankParts * C::kRankCols; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (!C::kWarpgroup || j < 2 * fused_tiles)
            parts[(part * C::kBlockM + first + j * 8 + quad * 2 + e % 2) * 16 + group + 8 * (e / 2)] =
                acc_t[j / C::kRankCols][0][j % C::kRankCols][e];
      block_sync();
    }
    for (int i = block.tid; i < C::kBlockM * ranks / 2; i += C::kThreads) {
      const int token = i / (ranks / 2), first_rank = i % (ranks / 2) * 2, m = first_token + token;
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = first_rank + e;
        float t = 0.0f;
        if (fused) {
          Acc sum = 0;
          for (int s = r / 16; s < C::t_parts(p.rank_tiles); s += p.rank_tiles) sum += parts[(s * C::kBlockM + token) * 16 + r % 16];
          if constexpr (C::kInt8) sum -= p.x_zero[block.item_of(token)] * p.a_sums[r];
          t = static_cast<float>(sum);
        } else if (m < p.m) {
#pragma unroll 8  // several loads under way
          for (int s = 0; s < p.t_splits; ++s) t += p.t[(static_cast<int64_t>(s) * p.m + m) * ranks + r];
        }
        v[e] = t * p.adapter_scale[r];
        if constexpr (C::kInt8) v[e] *= p.x_scale[block.item_of(token)];
      }
      if constexpr (C::kInt8)
        store(shared + token * pitch + first_rank * 4, uint2{round_tf32(v[0]), round_tf32(v[1])});
      else
        store(shared + token * pitch + first_rank * 2, pack2<T>(v[0], v[1]));
    }
    block_sync();
    for (int tile = 0; tile < p.rank_tiles; ++tile) {
      Codes<8> b[C::kRows];
#pragma unroll
      for (int i = 0; i < C::kRows; ++i) {
        const bool real = panel_of(i) < p.panels;
        const uint2 v = real ? load<uint2>(p.b + (static_cast<int64_t>(panel_of(i)) * p.rank_tiles + tile) * 256 + lane * 8)
                             : uint2{0x80808080u, 0x80808080u};
        b[i].word[0] = v.x;
        b[i].word[1] = v.y;
      }
      const char* const t_tile = shared + (warp_m * C::kCols * 8 + group) * pitch + (tile * 16 + quad * 4) * (C::kInt8 ? 4 : 2);
      if constexpr (C::kInt8) {
        // A lane's ranks 4t, 4t + 1 are one step of eight, 4t + 2, 4t + 3 the next.
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t w[C::kRows][4], t[C::kCols][2];
#pragma unroll
          for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const int code = static_cast<int>(b[i].word[r % 2] >> (8 * (step + 2 * (r / 2))) & 0xff) - 128;
              w[i][r] = float_to_bits(static_cast<float>(code));
            }
#pragma unroll
          for (int j = 0; j < C::kCols; ++j) {
            const uint2 v = load<uint2>(t_tile + j * 8 * pitch + step * 8);
            t[j][0] = v.x;
            t[j][1] = v.y;
          }
          mma_tf32(y, w, t);
        }
      } else {
        uint32_t w[C::kRows][4], t[C::kCols][2];
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) adapter_operand<T>(b[i], 0, w[i]);
#pragma unroll
        for (int j = 0; j < C::kCols; ++j) {
          const uint2 v = load<uint2>(t_tile + j * 8 * pitch);
          t[j][0] = v.x;
          t[j][1] = v.y;
        }
        mma16<T>(y, w, t);
      }
    }
    block_sync();
  }

  // --- Through shared memory, so that whole lines of y are written ---
  float* const out = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < C::kRows; ++i)
#pragma unroll
    for (int j = 0; j < C::kCols; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        out[token_of(j, e % 2) * C::kOutPitch + (warp_n * C::kRows + i) * kTileRows + group + 8 * (e / 2)] = y[i][j][e];
  block_sync();
  store_tile<C>(p, out, first_panel, first_token);
}

template <typename C>
CORA_GLOBAL(C::kThreads, 1) gemm_kernel(const GemmArgs p) {
  const Shares& shares = p.shares;
  const int worker = static_cast<int>(blockIdx.x);
  Piece piece;
  int left = 0;  // stages of this block after the piece
  if (shares.each == 0) {
    const int split = worker % shares.splits;
    const auto stage = [&](int i) { return static_cast<int>(static_cast<int64_t>(shares.stages) * i / shares.splits); };
    piece = {worker / shares.splits, stage(split), stage(split + 1)};
  } else {
    const int first = shares.begin(worker), tile = first / shares.stages, begin = first - tile * shares.stages;
    const int end = begin + shares.begin(worker + 1) - first;
    piece = {tile, begin, end < shares.stages ? end : shares.stages};
    left = end - piece.end;
  }
#pragma unroll 1
  for (;;) {
    compute<C>(p, piece);
    if (left == 0) return;
    block_sync();  // shared memory is the next tile's
    piece = {piece.tile + 1, 0, left < shares.stages ? left : shares.stages};
    left -= piece.end;
  }
}

}  // namespace cora::cuda
