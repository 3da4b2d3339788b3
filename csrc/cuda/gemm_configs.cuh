// The compiled tile shapes, and how a call gets to one. One file per type of x instantiates them (gemm_*.cu).
#pragma once

#include "cuda/gemm_warpgroups.cuh"

namespace cora::cuda {

struct TileShape {
  int block_n, block_m;
  int stage_tiles;  // of K, in a stage
  int stage_bytes;  // that a stage brings, with weights of 4 bits
  int partials;     // numbers a block leaves of a part of a tile
  int resident;     // blocks that share a multiprocessor
  bool fuses;       // an adapter's t may come from the same pass
};

//                       x type, bits,  warps N x M, tiles a warp, depth, stages, groups
template <typename T, int kBits>
using Decode8 = Config<T, kBits, 8, 1, 1, 1, 4, kBits == 8 ? 2 : 4>;  // a warp 16 channels, one column tile of x
template <typename T, int kBits>
using Decode16 = Config<T, kBits, 8, 1, 1, 2, 4, kBits == 8 ? 2 : 3>;
template <typename T, int kBits>
using Decode32 = Config<T, kBits, 16, 1, 1, 4, 2, kBits == 8 ? 2 : 3>;  // x through the caches half as often
template <typename T, int kBits>
using Decode64 = Config<T, kBits, kBits == 8 ? 8 : 16, 1, 1, 8, 2, 2>;
template <typename T, int kBits>
using Large128 =
    Config<T, kBits, 4, 2, 2, 8, 1, kBits == 8 ? 3 : 4>;  // 64 accumulators a lane, 64 more when an adapter is fused
template <typename T, int kBits>
using Small8 = Config<T, kBits, 4, 2, 2, 2, 1, 4>;
template <typename T, int kBits>
using Large8 = Config<T, kBits, 4, 2, 2, 8, 1, kBits == 8 ? 2 : 3, false>;
template <typename T, int kBits>
using Warpgroups64 = Config<T, kBits, 8, 1, 1, 8, 1, 4, false, true>;  // sm_90a: 128 channels x so many tokens
template <typename T, int kBits>
using Warpgroups128 = Config<T, kBits, 8, 1, 1, 16, 1, kBits == 8 ? 4 : 6, false, true>;
template <typename T, int kBits>
using Warpgroups192 = Config<T, kBits, 8, 1, 1, 24, 1, kBits == 8 ? 4 : 5, false, true>;
template <typename T, int kBits>
using WarpgroupsNarrow = Config<T, kBits, 4, 2, 1, 16, 1, 4, false, true>;  // 64 channels x 256 tokens

enum Tile16 : int { kDecode8 = 0, kDecode16, kDecode32, kDecode64, kLarge128 };
enum Tile8 : int { kSmall8 = 0, kLarge8, kWarpgroups64, kWarpgroups128, kWarpgroups192, kWarpgroupsNarrow };

template <typename C>
constexpr TileShape shape_of() {
  return {C::kBlockN, C::kBlockM, C::kTilesK, C::kAdapterAt, C::kPartials, C::kResident, C::kFuses};
}
/// container: bits that a code takes in a tile.
template <int kBits>
TileShape tile16_shape_of(int tile) {
  switch (tile) {
    case kDecode8: return shape_of<Decode8<Half, kBits>>();
    case kDecode16: return shape_of<Decode16<Half, kBits>>();
    case kDecode32: return shape_of<Decode32<Half, kBits>>();
    case kDecode64: return shape_of<Decode64<Half, kBits>>();
    default: return shape_of<Large128<Half, kBits>>();
  }
}
inline TileShape tile16_shape(int tile, int container) {
  return container == 8 ? tile16_shape_of<8>(tile) : tile16_shape_of<4>(tile);
}
inline TileShape tile8_shape(int tile) {
  switch (tile) {
    case kSmall8: return shape_of<Small8<Int8, 4>>();
    case kLarge8: return shape_of<Large8<Int8, 4>>();
    case kWarpgroups64: return shape_of<Warpgroups64<Int8, 4>>();
    case kWarpgroups128: return shape_of<Warpgroups128<Int8, 4>>();
    case kWarpgroups192: return shape_of<Warpgroups192<Int8, 4>>();
    default: return shape_of<WarpgroupsNarrow<Int8, 4>>();
  }
}

template <typename C>
const char* launch_gemm(const GemmArgs& args, void* stream) {
  return launch_when(args.early, gemm_kernel<C>, Dim3{static_cast<unsigned>(args.shares.workers), 1, 1}, C::kThreads,
                     static_cast<size_t>(C::shared_bytes(args.t_out != nullptr ? 0 : args.rank_tiles, args.fused)),
                     stream, args);
}

/// Calls launch_gemm with the shape Shape<T, container>.
template <template <typename, int> class Shape, typename T>
const char* with_container(int container, const GemmArgs& args, void* stream) {
  switch (container) {
    case 2: return launch_gemm<Shape<T, 2>>(args, stream);
    case 3: return launch_gemm<Shape<T, 3>>(args, stream);
    case 4: return launch_gemm<Shape<T, 4>>(args, stream);
    default: return launch_gemm<Shape<T, 8>>(args, stream);
  }
}

template <typename T>
const char* dispatch16(int container, int tile, const GemmArgs& args, void* stream) {
  switch (tile) {
    case kDecode8: return with_container<Decode8, T>(container, args, stream);
    case kDecode16: return with_container<Decode16, T>(container, args, stream);
    case kDecode32: return with_container<Decode32, T>(container, args, stream);
    case kDecode64: return with_container<Decode64, T>(container, args, stream);
    default: return with_container<Large128, T>(container, args, stream);
  }
}

const char* gemm_half(int container, int tile, const GemmArgs& args, void* stream);
const char* gemm_bfloat16(int container, int tile, const GemmArgs& args, void* stream);
const char* gemm_int8(int container, int tile, const GemmArgs& args, void* stream);
const char* gemm_warpgroups(int container, int tile, const GemmArgs& args, void* stream);

}  // namespace cora::cuda
