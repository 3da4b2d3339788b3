// How a layer lies in GPU memory, and how its inputs are walked. Host and device; no CUDA types.
//
// A *tile* is 16 output channels x 64 inputs: what one warp dequantizes at a time. Lane l = 4g + t of the warp owns
// rows g and g + 8 of it and, of every 16 inputs j, the four at 4t; so its 32 codes are
//     (j, h, i):  row g + 8h,  input 16j + 4t + i,      j = 0..3, h = 0..1, i = 0..3
// and lie together, in the order in which the mma instructions take them (cf. platform.cuh). With i = 2 * hi + e:
//     4 bits: word j of the lane's 16 bytes,       bit 4 (2 hi + h) + 16 e
//     2 bits: word j / 2 of its 8 bytes,           bit 2 (4 hi + 2 (j % 2) + h) + 16 e
//     3 bits: the low two bits as above, in the first 256 bytes of the tile; the high ones after them,
//             one word a lane,                     bit 8 hi + 2 j + h + 16 e
//     8 bits: (for 5..8) plane j / 2 of 512 bytes, word 2 (j % 2) + h of the lane's 16, byte hi + 2 e
// A pair e = 0, 1 is always 16 bits apart: one mask makes it a pair of 16-bit numbers. The four i of an (h, j) are
// always 8 bits apart, in the order 0, 2, 1, 3: one mask makes them a register of bytes. So the same memory feeds
// the 16-bit and the 8-bit tensor cores, and a warp reads a tile in full 16-byte accesses without bank conflicts.
//
// Inputs are walked in the order [segment][tap][channel]: a segment is a scale group (one of all channels without
// groups), its channels are padded to a multiple of 16, and the whole segment to 64. Tiles follow each other as
// [64 inputs][16 channels], so that the tiles a thread block needs next to each other are next to each other.
#pragma once

#include "bits.h"

#include <cstdint>

namespace cora::cuda {

constexpr int kTileRows = 16;    // output channels of a tile
constexpr int kTileInputs = 64;  // inputs of a tile
constexpr int kRunAlign = 16;    // channels of a tap are padded to this: 16 bytes of 8-bit codes
constexpr int kMaxRank = 256;    // above, the adapter is merged into the weight for the call

CORA_HOST_DEVICE inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/// A packed layer as the host describes it. groups: of the convolution; q_groups: scale groups of a row.
struct LayerShape {
  int32_t n, channels, groups;  // outputs, inputs (both over all groups)
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t bits, q_rows, q_groups, rank;
  int32_t adapter;  // kInt8, kFloat32, kFloat16 or kBfloat16 (rank > 0)
};

enum ElementType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kUint8 = 3, kInt8 = 4 };

struct Walk {
  int32_t taps, segments;
  int32_t segment_channels;    // real channels of a segment
  int32_t run;                 // the same, padded
  int32_t blocks_per_segment;  // tiles along a segment
  CORA_HOST_DEVICE int32_t blocks() const { return segments * blocks_per_segment; }
};

inline int32_t taps_of(const LayerShape& s) { return s.kernel[0] * s.kernel[1]; }
inline int64_t columns_of(const LayerShape& s) { return static_cast<int64_t>(s.channels / s.groups) * taps_of(s); }

/// Whether the fused kernels take the layer: ungrouped, scale groups of whole channels, an int8 adapter or none.
inline bool is_tiled(const LayerShape& s) {
  return s.groups == 1 && s.channels % s.q_groups == 0 && (s.q_groups == 1 || s.channels / s.q_groups % 8 == 0) &&
         (s.rank == 0 || (s.adapter == kInt8 && s.rank <= kMaxRank));
}

/// Whether the layer's weight is merged by tiles: fast, and a filter lies channels-last then. Else it is contiguous.
inline bool merges_by_tiles(const LayerShape& s, int type) {
  return is_tiled(s) && columns_of(s) > 0 && (type == kFloat16 || type == kBfloat16);
}

inline Walk walk_of(const LayerShape& s) {
  Walk w{};
  w.taps = taps_of(s);
  w.segments = s.q_groups;
  w.segment_channels = s.channels / s.q_groups;
  w.run = static_cast<int32_t>(round_up(w.segment_channels, kRunAlign));
  w.blocks_per_segment =
      static_cast<int32_t>(round_up(static_cast<int64_t>(w.taps) * w.run, kTileInputs) / kTileInputs);
  return w;
}

/// Bits a code takes in a tile.
CORA_HOST_DEVICE inline int container_bits(int bits) { return bits <= 4 ? bits : 8; }
CORA_HOST_DEVICE inline int tile_bytes(int container) { return kTileRows * kTileInputs / 8 * container; }

/// Where the 8-bit kernels put the zero-point: codes minus this fit int8. What is left over (zero-points far off,
/// and those of 8-bit codes that are not 128) is paid by sums of x.
CORA_HOST_DEVICE inline int nearest_zero(int zero_point, int bits) {
  const int lowest = max_code(bits) - 127;
  return zero_point < lowest ? lowest : zero_point > 128 ? 128 : zero_point;
}

/// Byte offsets of the parts of a prepared layer. Tiled: everything below; else `codes` as in the file and the
/// parameters as they came.
struct Parts {
  int64_t tiles;          // [blocks][panels] tiles
  int64_t qparams;        // float (scale, zero-point) [segments][16 panels]
  int64_t sums;           // int32 [segments][16 panels]: sum of code - nearest_zero over the segment
  int64_t a_tiles;        // [blocks][rank tiles] 8-bit tiles of code ^ 0x80
  int64_t a_sums;         // int32 [16 rank tiles]
  int64_t a_qparams;      // float (1, 128) [16 rank tiles]: under which A's tiles are a weight
  int64_t adapter_scale;  // float [16 rank tiles]
  int64_t b_tiles;        // [panels][rank tiles][lane] 8 bytes: row g: ranks 4t.., row g + 8: the same; code ^ 0x80
  int64_t bias;           // float [16 panels]
  int64_t bytes;
  int32_t panels, rank_tiles;
};

/// 3 becomes 4: four warps share the tiles of a fused adapter evenly.
inline int32_t rank_tiles_of(int32_t rank) {
  const int32_t tiles = static_cast<int32_t>(round_up(rank, 16) / 16);
  return tiles == 3 ? 4 : tiles;
}

inline int element_bytes(int32_t type) { return type == kFloat32 ? 4 : type == kFloat16 || type == kBfloat16 ? 2 : 1; }

/// Bytes after a part that belong to none.
struct Gaps {
  int64_t begin[9], end[9];
  int32_t count;
};

inline Parts parts_of(const LayerShape& s, Gaps* gaps = nullptr) {
  Parts p{};
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at = round_up(at + bytes, 256);
    if (gaps != nullptr && begin + bytes != at) {
      gaps->begin[gaps->count] = begin + bytes;
      gaps->end[gaps->count++] = at;
    }
    return begin;
  };
  if (is_tiled(s)) {
    const Walk w = walk_of(s);
    p.panels = static_cast<int32_t>(round_up(s.n, kTileRows) / kTileRows);
    p.rank_tiles = rank_tiles_of(s.rank);
    const int64_t rows = static_cast<int64_t>(p.panels) * kTileRows, ranks = static_cast<int64_t>(p.rank_tiles) * 16;
    p.tiles = take(static_cast<int64_t>(w.blocks()) * p.panels * tile_bytes(container_bits(s.bits)));
    p.qparams = take(w.segments * rows * 8);
    p.sums = take(w.segments * rows * 4);
    p.a_tiles = take(static_cast<int64_t>(w.blocks()) * p.rank_tiles * tile_bytes(8));
    p.a_sums = take(ranks * 4);
    p.a_qparams = take(ranks * 8);
    p.adapter_scale = take(ranks * 4);
    p.b_tiles = take(static_cast<int64_t>(p.panels) * p.rank_tiles * 256);
    p.bias = take(rows * 4);
  } else {
    const int64_t q = static_cast<int64_t>(s.q_rows) * s.q_groups, k = columns_of(s);
    const int64_t ranks = static_cast<int64_t>(s.groups) * s.rank, size = element_bytes(s.adapter);
    p.tiles = take(s.n * row_bytes(k, s.bits));
    p.qparams = take(q * 4);
    p.sums = take(q * 4);  // zero-points
    p.a_tiles = take(ranks * k * size);
    p.adapter_scale = take(ranks * 4);
    p.b_tiles = take(static_cast<int64_t>(s.n) * s.rank * size);
    p.bias = take(static_cast<int64_t>(s.n) * 4);
  }
  p.bytes = at;
  return p;
}

/// n / divisor by a multiplication; n < 2^31.
struct FastDivide {
  uint32_t divisor, multiplier, shift;
};
inline FastDivide fast_divide(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t m = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - static_cast<uint64_t>(divisor))) /
                         static_cast<uint64_t>(divisor) +
                     1;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(m), shift};
}

/// A pixel tensor: element strides of an image, a row, a pixel, a channel.
struct PixelStrides {
  int64_t item, row, pixel, channel;
};

/// The border of codes [items, height, width, channels], channels-last and contiguous, `halo` pixels wide (sizes
/// include it): to be filled with a zero-point. No codes: nothing to do.
struct Border {
  uint8_t* codes;
  int32_t items, height, width, channels, halo, value;
};

/// What becomes of y = conv + adapter + bias: y = clamp(y + add, low, high), then a float or an 8-bit code.
struct Epilogue {
  void* out;
  PixelStrides out_strides;
  int32_t out_type;  // kFloat32, kFloat16, kBfloat16; kUint8: clamp(rint(y / out_scale) + out_zero, 0, out_top)
  float out_scale;
  float out_inverse;  // not 0: y * out_inverse instead of y / out_scale
  int32_t out_zero, out_top;
  const void* add;  // or null
  PixelStrides add_strides;
  int32_t add_type;  // kUint8: add_scale * (code - add_zero)
  float add_scale;
  int32_t add_zero;
  float low, high;
  Border border;  // of out
};

}  // namespace cora::cuda
