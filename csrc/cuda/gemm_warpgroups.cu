// GEMM on 8-bit codes with Hopper's warpgroup instructions. They exist in sm_90a alone, so this file is compiled for it
// alone, and only where it is among the architectures asked for (CORA_WARPGROUPS).
#include "cuda/gemm_configs.cuh"

namespace cora::cuda {

const char* gemm_warpgroups(int container, const GemmArgs& args, void* stream) {
  return with_container<Warpgroups8, Int8>(container, args, stream);
}

}  // namespace cora::cuda
