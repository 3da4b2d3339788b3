// What a launch of the GEMM is given, and the tile of y that a block of threads computes: its sizes, its ring of stages
// in shared memory, how x and the weights get there, and x from there to registers. The kernel is in gemm.cuh.
#pragma once

#include "cuda/dequantize.cuh"
#include "cuda/elements.cuh"

namespace cora::cuda {

struct Int8 {};  // x as unsigned 8-bit codes

/// How blocks of threads share the tiles of y. `each` 0: `splits` blocks a tile, each with its part of K; otherwise the
/// stages of all tiles stand in a row, and block w takes each + (w < more) of them.
struct Shares {
  int32_t stages;  // of a tile
  int32_t workers, splits, each, more;
  FastDivide by_stages, by_splits, by_each, by_longer;

  CORA_HOST_DEVICE int begin(int worker) const { return worker * each + (worker < more ? worker : more); }
  CORA_DEVICE int owner(int stage) const {
    const int longer = more * (each + 1);
    return stage < longer ? static_cast<int>(quotient(static_cast<uint32_t>(stage), by_longer))
                          : more + static_cast<int>(quotient(static_cast<uint32_t>(stage - longer), by_each));
  }
};

inline Shares split_tiles(int64_t tiles, int stages, int splits) {
  const FastDivide one = fast_divide(1);
  return {stages, static_cast<int32_t>(tiles * splits), splits, 0, 0, fast_divide(stages), fast_divide(splits), one,
          one};
}
/// workers <= tiles * stages < 2^31.
inline Shares share_tiles(int64_t tiles, int stages, int workers) {
  const auto all = static_cast<int32_t>(tiles * stages);
  const int each = all / workers;
  return {stages,         workers,           0,
          each,           all % workers,     fast_divide(stages),
          fast_divide(1), fast_divide(each), fast_divide(each + 1)};
}

struct GemmArgs {
  const char* x;
  int64_t x_item, x_row, x_pixel;  // strides in bytes; channels are contiguous
  int32_t height, width;           // of x: taps outside read zeros
  int32_t stride[2], padding[2], dilation[2], kernel_w;
  int32_t channels;  // of a pixel of x
  bool contiguous;   // input i of the walk is channel i of the pixel
  FastDivide pixels, out_w, run, taps_w, segment_blocks;
  FastDivide n_blocks;  // tiles of y along the channels
  Walk walk;
  int32_t m, n, panels;
  const uint8_t *w, *a, *b;
  const float2* qparams;
  const int32_t *sums, *a_sums;
  const float *adapter_scale, *bias;
  int32_t bits, rank_tiles;
  bool grouped;    // qparams and sums are by segment
  bool fused;      // t from this kernel
  const float* t;  // or from these partial sums [t_splits][m][16 rank_tiles]
  int32_t t_splits;
  const float* x_scale;   // 8-bit x: [items], items being images (tokens, for a matrix)
  const int32_t* x_zero;  // [items]
  int32_t x_parameters;   // items that have parameters of their own, or 1
  Shares shares;
  void* partial;         // [workers][2][kParts][threads], float or int32
  unsigned* tickets;     // [tiles of y], zero before the launch
  float* t_out;          // not null: this is the pass that computes t; x A^T goes to [splits][m][panels * 16]
  int32_t ticket_count;  // ... and it clears these many tickets
  bool early;            // launched while the pass before it runs: wait_for_launch_before before reading its results
  Epilogue epilogue;
};

// --- The tile a block computes ----------------------------------------------------------------------------------

/// kWarpsN x kWarpsM warps, each kRows tiles of 16 channels x kCols of 8 tokens; kDepth: 128-byte pieces of an x row
/// a stage; kGrouped: the weight has scale groups (8-bit x pays registers for it, 16-bit x nothing); kWarpgroup: by
/// warpgroup instructions. 16-bit x with one warp along M (kStream): a tile of the weight is wanted by one warp alone,
/// which copies it (multiply_by_stream).
template <typename T_, int kBits_, int kWarpsN_, int kWarpsM_, int kRows_, int kCols_, int kDepth_, int kStages_,
          bool kGrouped_ = true, bool kWarpgroup_ = false>
struct Config {
  using T = T_;
  static constexpr bool kInt8 = std::is_same_v<T, Int8>, kGrouped = kGrouped_;
  static constexpr int kBits = kBits_, kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kRows = kRows_, kCols = kCols_;
  static constexpr int kDepth = kDepth_, kStages = kStages_;
  static constexpr bool kWarpgroup = kWarpgroup_;
  static constexpr bool kStream = !kInt8 && kWarpsM == 1;
  static_assert(!kWarpgroup ||
                (kInt8 && !kGrouped && kWarpsN % 4 == 0 && kWarpsN * kWarpsM == 8 && kRows == 1 && kDepth == 1));
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM;
  static constexpr int kBlockN = 16 * kWarpsN * kRows, kBlockM = 8 * kWarpsM * kCols;
  static constexpr int kPanels = kBlockN / kTileRows;
  static constexpr int kTilesPerPiece = kInt8 ? 2 : 1;     // tiles along K in 128 bytes of x
  static constexpr int kTilesK = kDepth * kTilesPerPiece;  // ... in a stage
  /// Blocks that share a multiprocessor, for which the compiler is to find registers.
  static constexpr int kResident = kStream ? 512 / kThreads : kWarpgroup && kCols <= 8 && kBits < 8 ? 2 : 1;
  static_assert(!kStream || (kRows == 1 && kTilesK % 2 == 0 && kTilesK <= 4));
  /// Stages under way: one less than the ring has while one is read; warpgroups may still read the one before it.
  static constexpr int kAhead = kStages - (kWarpgroup ? 2 : 1);
  /// Whether an adapter may be fused: not where few tokens of 16-bit x leave the call bound by bytes (see plan).
  static constexpr bool kFuses = kInt8 || kBlockM >= 128;
  /// A fused adapter's accumulators of a warp: kRankCols tiles. Warpgroups: a warp takes a quarter of the tokens, and
  /// one of two rank tiles, or half of the inputs.
  static constexpr int kRankCols = !kFuses ? 1 : kWarpgroup ? kBlockM / 32 : kCols;
  /// Scale groups of 16-bit x: with few tokens their sums are scaled, else their weights, whichever are fewer.
  static constexpr bool kScaleSums = kStream && kCols <= 4;
  /// What a thread, and a block, leaves of a part of a tile: accumulators, with 8-bit x the sums of x, a fused t.
  static constexpr int kXSums = kWarpgroup ? kBlockM * 8 / kThreads : kCols;
  static constexpr int kAcc = kRows * kCols * 4, kSums = kInt8 ? kXSums : 0;
  static constexpr int kAccT = kFuses ? kRankCols * 4 : 0;
  static constexpr int kParts = kAcc + kSums + kAccT, kPartials = kParts * kThreads;
  static constexpr int kChunkInputs = kInt8 ? 16 : 8;  // inputs in 16 bytes of x
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
    const int ring = kStages * stage_bytes(fused ? rank_tiles : 0) + (kWarpgroup ? 32 : 0);  // a flag a warp
    const int parts = fused ? t_parts(rank_tiles) * kBlockM * 16 * 4 : 0;
    const int t = rank_tiles == 0 ? 0 : kBlockM * t_pitch(rank_tiles) + parts;
    const int y = kBlockM * kOutPitch * 4;
    return ring > t ? (ring > y ? ring : y) : (t > y ? t : y);
  }
  /// Bytes of a token's t: 16 more than needed, so that 8 tokens lie in different banks.
  CORA_HOST_DEVICE static int t_pitch(int rank_tiles) { return rank_tiles * 16 * (kInt8 ? 4 : 2) + 16; }
  /// Parts [token][16] that a fused t comes in: part i is of rank tile i % rank_tiles.
  CORA_HOST_DEVICE static int t_parts(int rank_tiles) { return kWarpgroup ? 2 : kWarpsN; }
};

/// Position of 16-byte chunk `chunk` (0..7) of a row of x in shared memory. 16-bit x is read as 8 bytes a lane, half a
/// warp at a time: 4 rows x 2 neighbouring chunks; 8-bit x by ldmatrix: 8 rows x 1 chunk.
template <typename C>
CORA_DEVICE int chunk_of(int row, int chunk) {
  return C::kInt8 ? chunk ^ (row & 7) : chunk ^ ((row & 3) << 1);
}

/// Row m of y: which pixel of which image.
struct Pixel {
  uint32_t item, y, x;
};
CORA_DEVICE Pixel pixel_of(const GemmArgs& p, int m) {
  const uint32_t item = quotient(static_cast<uint32_t>(m), p.pixels);
  const uint32_t pixel = static_cast<uint32_t>(m) - item * p.pixels.divisor, y = quotient(pixel, p.out_w);
  return {item, y, pixel - y * p.out_w.divisor};
}
CORA_DEVICE int64_t place_in(const PixelStrides& s, const Pixel& pixel) {
  return pixel.item * s.item + pixel.y * s.row + pixel.x * s.pixel;
}

/// Where 16 bytes of x lie, from where a window begins: so many rows and pixels on, so many bytes.
struct InputPlace {
  int dy, dx;
  int64_t offset;
  bool inside;  // of the walk
};

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

  CORA_DEVICE Block(const GemmArgs& args, int tile_of_y, int end) : p(args), shared(shared_memory()), end_block(end) {
    find(tile_of_y);
#pragma unroll
    for (int i = 0; i < kLoadRows; ++i) {
      const int m = first_token + tid / 8 % C::kBlockM + i * (C::kThreads / 8);
      const Pixel pixel = pixel_of(p, m);
      row_y[i] = static_cast<int>(pixel.y) * p.stride[0] - p.padding[0];
      row_x[i] = static_cast<int>(pixel.x) * p.stride[1] - p.padding[1];
      row[i] = p.x + static_cast<int64_t>(pixel.item) * p.x_item + row_y[i] * p.x_row + row_x[i] * p.x_pixel;
      if (m >= p.m) row_y[i] = -(1 << 24);  // outside whatever the tap
    }
  }

  /// Again after the loop over K, so that it does not keep all this in registers.
  CORA_DEVICE void find(int tile_of_y) {
    const auto row_of_tiles = static_cast<int>(quotient(static_cast<uint32_t>(tile_of_y), p.n_blocks));
    first_panel = (tile_of_y - row_of_tiles * static_cast<int>(p.n_blocks.divisor)) * C::kPanels;
    first_token = row_of_tiles * C::kBlockM;
    tid = reread_thread_index();
    lane = tid % 32;
    group = lane / 4;
    quad = lane % 4;
    warp_n = tid / 32 % C::kWarpsN;
    warp_m = tid / 32 / C::kWarpsN;
  }

  /// The panel of this warp's row tile i; the token, within the block, of this lane's accumulators e of column tile j.
  CORA_DEVICE int panel_of(int i) const { return first_panel + warp_n * C::kRows + i; }
  CORA_DEVICE int token_of(int j, int e) const { return (warp_m * C::kCols + j) * 8 + quad * 2 + e; }

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

  /// Inputs `in_tile` .. of tile kb of K.
  CORA_DEVICE InputPlace place_of(int kb, int in_tile) const {
    const int segment = C::kGrouped ? static_cast<int>(quotient(static_cast<uint32_t>(kb), p.segment_blocks)) : 0;
    const auto k = static_cast<uint32_t>((kb - segment * p.walk.blocks_per_segment) * kTileInputs + in_tile);
    const int tap = static_cast<int>(quotient(k, p.run)), channel = static_cast<int>(k) - tap * p.walk.run;
    const int tap_y = static_cast<int>(quotient(static_cast<uint32_t>(tap), p.taps_w));
    const int dy = tap_y * p.dilation[0], dx = (tap - tap_y * p.kernel_w) * p.dilation[1];
    const int64_t offset = dy * p.x_row + dx * p.x_pixel +
                           static_cast<int64_t>(segment * p.walk.segment_channels + channel) * (C::kInt8 ? 1 : 2);
    return {dy, dx, offset, kb < end_block && tap < p.walk.taps && channel < p.walk.segment_channels};
  }
  /// Whether they lie in the image, for row i that this thread copies.
  CORA_DEVICE bool has(const InputPlace& place, int i) const {
    return place.inside && static_cast<unsigned>(row_y[i] + place.dy) < static_cast<unsigned>(p.height) &&
           static_cast<unsigned>(row_x[i] + place.dx) < static_cast<unsigned>(p.width);
  }

  /// Copies tiles `block` .. of K to a stage.
  CORA_DEVICE void copy_stage(int block, char* stage) {
    if (tid < C::kBlockM * 8) {
      const int chunk = tid % 8;
#pragma unroll
      for (int piece = 0; piece < C::kDepth; ++piece) {
        const int kb = block + piece * C::kTilesPerPiece + (C::kInt8 ? chunk / 4 : 0);
        const InputPlace place = place_of(kb, (C::kInt8 ? chunk % 4 : chunk) * C::kChunkInputs);
#pragma unroll
        for (int i = 0; i < kLoadRows; ++i) {
          const int r = tid / 8 + i * (C::kThreads / 8);
          async_copy16(stage + piece * C::kPieceBytes + r * 128 + chunk_of<C>(r, chunk) * 16, row[i] + place.offset,
                       has(place, i));
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
  /// later going, to the place that was read last.
  CORA_DEVICE const char* next_stage(int k, int stage, int stage_bytes) {
    async_wait<C::kAhead - 1>();
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
        const uint2 v = load<uint2>(stage + tile * C::kPieceBytes + r * 128 + chunk_of<C>(r, step * 2 + quad / 2) * 16 +
                                    quad % 2 * 8);
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

}  // namespace cora::cuda
