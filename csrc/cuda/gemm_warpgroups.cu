// GEMM on 8-bit codes with Hopper's warpgroup instructions. They exist in sm_90a alone, so this file is compiled for it
// alone, and only where it is among the architectures asked for (CORA_WARPGROUPS).
#include "cuda/gemm_configs.cuh"

namespace cora::cuda {

const char* gemm_warpgroups(int container, int tile, const GemmArgs& args, void* stream) {
  switch (tile) {
    case kWarpgroups64: return with_container<Warpgroups64, Int8>(container, args, stream);
    case kWarpgroups128: return with_container<Warpgroups128, Int8>(container, args, stream);
    case kWarpgroups192: return with_container<Warpgroups192, Int8>(container, args, stream);
    default: return with_container<WarpgroupsNarrow, Int8>(container, args, stream);
  }
}

}  // namespace cora::cuda
