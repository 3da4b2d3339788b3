// What the files of AMX kernels share: the shape of a step, sums, and the adapter's hidden values as bfloat16.
#pragma once

#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

// Constants stay in registers from piece to piece only where all of a tile's work is one function.
#define CORA_INLINE inline __attribute__((always_inline))

CORA_BEGIN_AMX

namespace cora::cpu::amx {

constexpr int kRows = 16;
constexpr int kRowBytes = 64, kWeightRow = 2 * kRowBytes, kStepWeights = kRows * kWeightRow;

/// Work for the vector units that is given out in pieces between tile instructions, which so overlap best.
struct NoWork {
  void some() {}
};

/// Tiles 0..3, two a block of rows -> sum [blocks * block][32].
template <int kBlocks, typename Sum, typename Work>
CORA_INLINE void store_sums(int block, Sum* sum, Work& work) {
  _tile_stored(0, sum, kLanes * sizeof(Sum));
  work.some();
  _tile_stored(1, sum + 16, kLanes * sizeof(Sum));
  work.some();
  if (kBlocks > 1) {
    _tile_stored(2, sum + block * kLanes, kLanes * sizeof(Sum));
    work.some();
    _tile_stored(3, sum + block * kLanes + 16, kLanes * sizeof(Sum));
    work.some();
  }
}
template <int kBlocks, typename Sum>
inline void store_sums(int block, Sum* sum) {
  NoWork none;
  store_sums<kBlocks>(block, sum, none);
}
/// Every row of tiles 0..3 is `start` [32].
template <int kBlocks, typename Sum>
CORA_INLINE void start_sums(const Sum* start) {
  _tile_loadd(0, start, 0);
  _tile_loadd(1, start + 16, 0);
  if (kBlocks > 1) _tile_loadd(2, start, 0);
  if (kBlocks > 1) _tile_loadd(3, start + 16, 0);
}

// A hidden value is kept as the sum of two bfloat16, which keeps 16 of its 24 bits: a word, the larger one in its upper
// half. They lie in tiles of 16 ranks, a row of x a tile row; B's tiles have each rank twice, [16 ranks][32 lanes][2].
constexpr int kTileRanks = 16;
constexpr int64_t kUpTile = kStepWeights;  // bytes

/// Of 16 ranks. In integers as far as that goes: while tiles are worked on, half of the floating-point units is.
CORA_INLINE void store_split(__m512 v, void* out) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i head = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(v), half), upper);
  const __m512i rest = _mm512_castps_si512(_mm512_sub_ps(v, _mm512_castsi512_ps(head)));
  _mm512_storeu_si512(out, _mm512_or_si512(head, _mm512_srli_epi32(_mm512_add_epi32(rest, half), 16)));
}

/// Tiles 0..3 = bias + hidden * b.
template <int kBlocks, typename Work>
CORA_INLINE void multiply_hidden(const void* u, int block, int64_t rank, const void* b, const float* bias, Work& work) {
  start_sums<kBlocks>(bias);
  const int64_t tiles = (rank + kTileRanks - 1) / kTileRanks;
  const char* w = static_cast<const char*>(b);
  for (int64_t tile = 0; tile < tiles; ++tile, w += kUpTile) {
    const char* hidden = static_cast<const char*>(u) + tile * kMaxTileM * kRowBytes;
    _tile_loadd(4, hidden, kRowBytes);
    _tile_loadd(6, w, kWeightRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + kRowBytes, kWeightRow);
    _tile_dpbf16ps(1, 4, 7);
    work.some();
    if (kBlocks > 1) {
      _tile_loadd(5, hidden + block * kRowBytes, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      work.some();
    }
  }
}

}  // namespace cora::cpu::amx

CORA_END_TARGET
#endif
