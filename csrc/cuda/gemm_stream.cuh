// The loop over K for few tokens of 16-bit x, where a call should cost what it takes to read the weight, and
// instructions are what it costs first: of 74 a tile of 16 x 64 weights, 41 turn codes into operands and multiply them.
// Large stages, so that barriers and addresses are few; a warp copies and reads its own tiles of the weight.
#pragma once

#include "cuda/gemm_tile.cuh"

namespace cora::cuda {

/// How scale groups lie to the tiles of K.
enum StreamScales : int { kOneGroup = 0, kByPairs, kByTiles };

/// The copies of a stage, as this thread sees them. `stage` is an address in shared memory.
template <typename C, int kScales>
struct StreamCopies {
  static constexpr int kChunks = C::kTileBytes / 16;  // of a tile of the weight
  static constexpr int kRowsOnce = C::kThreads / 8;   // of the pieces of x, that all threads copy at a time
  static constexpr int kCopies = C::kDepth * C::kBlockM / kRowsOnce;
  static constexpr int kRows = Block<C>::kLoadRows;

  const Block<C>& block;
  bool active;            // a warp beyond the weight only helps to copy x
  const uint8_t* weight;  // of the first tile of K
  uint32_t weight_step;   // to the next
  const float2* scale;    // of the first segment
  int reach[kRows];       // inputs of the row of x, if they lie one after the other as the walk takes them

  CORA_DEVICE explicit StreamCopies(const Block<C>& b) : block(b) {
    const GemmArgs& p = block.p;
    active = block.panel_of(0) < p.panels;
    const auto panel = static_cast<uint32_t>(active ? block.panel_of(0) : 0);
    weight = p.w + uint64_t{panel} * C::kTileBytes;
    weight_step = static_cast<uint32_t>(p.panels * C::kTileBytes);
    scale = p.qparams + uint64_t{panel} * kTileRows + block.lane % 8 * 2;
    const int inputs = block.end_block * kTileInputs < p.channels ? block.end_block * kTileInputs : p.channels;
#pragma unroll
    for (int r = 0; r < kRows; ++r) reach[r] = block.has({0, 0, 0, true}, r) ? inputs : 0;
  }

  /// Tiles k .. of K; beyond its end x is zero, and the last tile of the weight comes again: its codes do not matter,
  /// but its scales must be numbers.
  CORA_DEVICE void copy(int k, uint32_t stage) const {
    const GemmArgs& p = block.p;
    const auto within = [&](int kb) { return static_cast<uint32_t>(kb < block.end_block ? kb : block.end_block - 1); };
    if (active) {
      const uint32_t to = stage + C::kWeightAt + block.warp_n * C::kTileBytes;
#pragma unroll
      for (int i = 0; i < (C::kTilesK * kChunks + 31) / 32; ++i) {
        const int tile = (block.lane + 32 * i) / kChunks, chunk = (block.lane + 32 * i) % kChunks;
        if (C::kTilesK * kChunks % 32 != 0 && tile >= C::kTilesK) break;
        async_copy16(to + tile * (C::kPanels * C::kTileBytes) + chunk * 16,
                     weight + uint64_t{within(k + tile)} * weight_step + chunk * 16);
      }
      if constexpr (kScales != kOneGroup) {
        const int tile = block.lane / 8 * (kScales == kByPairs ? 2 : 1);
        if (tile < C::kTilesK)
          async_copy16(stage + C::kScaleAt + (tile * C::kBlockN + block.warp_n * kTileRows + block.lane % 8 * 2) * 8,
                       scale + uint64_t{quotient(within(k + tile), p.segment_blocks)} * (p.panels * kTileRows));
      }
    }
    const int chunk = block.tid % 8;
    const uint32_t to = stage + block.tid / 8 * 128 + chunk_of<C>(block.tid / 8, chunk) * 16;
    if (p.contiguous) {
      const int first = (k + block.tid / 8 / C::kBlockM) * kTileInputs + chunk * C::kChunkInputs;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int input = first + i * kRowsOnce / C::kBlockM * kTileInputs;
        async_copy16(to + i * kRowsOnce * 128, block.row[i % kRows] + int64_t{input} * 2, input < reach[i % kRows]);
      }
      return;
    }
#pragma unroll(kRows)  // registers for no more
    for (int i = 0; i < kCopies; ++i) {
      const int kb = k + block.tid / 8 / C::kBlockM + i * kRowsOnce / C::kBlockM;
      const InputPlace place = block.place_of(kb, chunk * C::kChunkInputs);
      async_copy16(to + i * kRowsOnce * 128, block.row[i % kRows] + place.offset, block.has(place, i % kRows));
    }
  }
};

/// acc += the warp's 16 channels x kCols tiles of 8 tokens. Tiles of x beyond K hold zeros: no branch for them.
template <typename C, int kScales>
CORA_DEVICE void stream_stages(const Block<C>& block, RowParameters<C>& row, int begin, int end,
                               float (&acc)[1][C::kCols][4]) {
  using T = typename C::T;
  constexpr bool kScaleSums = C::kScaleSums && kScales != kOneGroup;
  const StreamCopies<C, kScales> copies(block);
  const uint32_t first = shared_begin(), after = first + C::kStages * C::kAdapterAt;
  uint32_t fill = first;
#pragma unroll 1
  for (int i = 0; i < C::kAhead; ++i) {
    if (begin + i * C::kTilesK < end) copies.copy(begin + i * C::kTilesK, fill);
    async_commit();
    fill += C::kAdapterAt;
  }
  // Where the lane's four inputs of a step lie in a row of x: chunk_of(row, 2 step + quad / 2), its half quad % 2.
  const uint32_t x_at = block.group * 128 + chunk_of<C>(block.group, block.quad / 2) * 16 + block.quad % 2 * 8;
  const uint32_t weight_at = C::kWeightAt + block.warp_n * C::kTileBytes;
  const uint32_t scale_at = C::kScaleAt + (block.warp_n * kTileRows + block.group) * 8;
  [[maybe_unused]] float scaled[C::kCols][4] = {};  // kScaleSums: the sum of the groups so far
  uint32_t stage = first;
#pragma unroll 1
  for (int k = begin; k < end; k += C::kTilesK) {
    async_wait<C::kAhead - 1>();
    block_sync();
    if (k + C::kAhead * C::kTilesK < end) copies.copy(k + C::kAhead * C::kTilesK, fill);
    async_commit();
    fill = fill + C::kAdapterAt == after ? first : fill + C::kAdapterAt;
    if (copies.active) {
#pragma unroll(C::kCols == 4 ? 1 : 2)  // registers for no more
      for (int tile = 0; tile < C::kTilesK; ++tile) {
        Codes<C::kBits> codes;
        codes.read(stage + weight_at + tile * C::kPanels * C::kTileBytes, block.lane);
        if (kScales == kByTiles || (kScales == kByPairs && tile % 2 == 0)) {
          const uint32_t q = stage + scale_at + tile * C::kBlockN * 8;
          row.set_both(load<float2>(q), load<float2>(q + 64));
        }
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t x[C::kCols][2], w[1][4];
#pragma unroll
          for (int c = 0; c < C::kCols; ++c) {
            const uint2 v = load<uint2>(stage + (x_at ^ (step * 32)) + tile * C::kPieceBytes + c * 1024);
            x[c][0] = v.x;
            x[c][1] = v.y;
          }
          row.operand(codes, step, kScales != kOneGroup && !kScaleSums, w[0]);
          mma16<T>(acc, w, x);
        }
        if (kScaleSums && (kScales == kByTiles || tile % 2 == 1)) {
#pragma unroll
          for (int c = 0; c < C::kCols; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              scaled[c][e] = fused_multiply_add(acc[0][c][e], row.scale[e / 2], scaled[c][e]);
              acc[0][c][e] = 0;
            }
        }
      }
    }
    stage = stage + C::kAdapterAt == after ? first : stage + C::kAdapterAt;
  }
  if constexpr (kScaleSums)
#pragma unroll
    for (int c = 0; c < C::kCols; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[0][c][e] = scaled[c][e];
}

template <typename C>
CORA_DEVICE void multiply_by_stream(const Block<C>& block, RowParameters<C>& row, int begin, int end, bool segmented,
                                    float (&acc)[1][C::kCols][4]) {
  if (!segmented)
    stream_stages<C, kOneGroup>(block, row, begin, end, acc);
  else if (block.p.walk.blocks_per_segment % 2 == 0)
    stream_stages<C, kByPairs>(block, row, begin, end, acc);
  else
    stream_stages<C, kByTiles>(block, row, begin, end, acc);
}

}  // namespace cora::cuda
