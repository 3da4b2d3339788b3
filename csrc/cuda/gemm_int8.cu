// GEMM on 8-bit codes; the kernel is in gemm.cuh.
#include "cuda/gemm_configs.cuh"

namespace cora::cuda {

const char* gemm_int8(int container, int tile, const GemmArgs& args, void* stream) {
  switch (tile) {
    case kSmall8: return with_container<Small8, Int8>(container, args, stream);
#if defined(CORA_WARPGROUPS)
    case kWarpgroups8: return gemm_warpgroups(container, args, stream);
#endif
    default: return with_container<Large8, Int8>(container, args, stream);
  }
}

}  // namespace cora::cuda
