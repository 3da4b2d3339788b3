// The loop over K for few tokens of 16-bit x, where a call should cost what it takes to read the weight: as little as
// possible besides. Large stages, so that barriers are few; a warp copies and reads its own tiles.
#pragma once

#include "cuda/gemm_tile.cuh"

namespace cora::cuda {

/// acc += the warp's 16 channels x kCols tiles of 8 tokens. Tiles of x beyond K hold zeros: no branch for them.
template <typename C>
CORA_DEVICE void multiply_by_stream(Block<C>& block, RowParameters<C>& row, int begin, int end, bool segmented,
                                    float (&acc)[1][C::kCols][4]) {
  using T = typename C::T;
  const bool active = block.panel_of(0) < block.p.panels;  // a warp beyond the weight only helps to copy x
  const bool by_tiles = block.scales_by_tiles();
  // Where the lane's four inputs of a step lie in a row of x: chunk_of(row, 2 step + quad / 2), its half quad % 2.
  const int x_at = block.group * 128 + chunk_of<C>(block.group, block.quad / 2) * 16 + block.quad % 2 * 8;
  const int weight_at = C::kWeightAt + block.warp_n * C::kTileBytes;
  const int scale_at = C::kScaleAt + (block.warp_n * kTileRows + block.group) * 8;
  [[maybe_unused]] float scaled[C::kCols][4] = {};  // kScaleSums: the sum of the groups so far
  int stage = 0;
  for (int k = begin; k < end; k += C::kTilesK) {
    const char* const from = block.next_stage(k, stage, C::kAdapterAt);
    stage = stage == C::kStages - 1 ? 0 : stage + 1;
    if (!active) continue;
#pragma unroll (C::kCols < 4 ? C::kTilesK : 1)  // registers
    for (int tile = 0; tile < C::kTilesK; ++tile) {
      Codes<C::kBits> codes;
      codes.read(from + weight_at + tile * C::kPanels * C::kTileBytes, block.lane);
      if (segmented && (tile % 2 == 0 || by_tiles)) {
        const char* const q = from + scale_at + tile * C::kBlockN * 8;
        row.set_both(load<float2>(q), load<float2>(q + 64));
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t x[C::kCols][2], w[1][4];
#pragma unroll
        for (int c = 0; c < C::kCols; ++c) {
          const uint2 v = load<uint2>(from + (x_at ^ (step * 32)) + tile * C::kPieceBytes + c * 1024);
          x[c][0] = v.x;
          x[c][1] = v.y;
        }
        row.operand(codes, step, segmented && !C::kScaleSums, w[0]);
        mma16<T>(acc, w, x);
      }
      if constexpr (C::kScaleSums) {
        if (segmented && (tile % 2 == 1 || by_tiles)) {
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
  }
  if constexpr (C::kScaleSums) {
    if (segmented)
#pragma unroll
      for (int c = 0; c < C::kCols; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[0][c][e] = scaled[c][e];
  }
}

}  // namespace cora::cuda
