// GEMM on 8-bit codes; the kernel is in gemm.cuh.
#include "cuda/gemm_configs.cuh"

namespace cora::cuda {

const char* gemm_int8(int container, int tile, const GemmArgs& args, void* stream) {
  switch (tile) {
    case kSmall8: return with_container<Small8, Int8>(container, args, stream);
    case kLarge8: return with_container<Large8, Int8>(container, args, stream);
#if defined(CORA_WARPGROUPS)
    default: return gemm_warpgroups(container, tile, args, stream);
#else
    default: return "built without warpgroup instructions";
#endif
  }
}

}  // namespace cora::cuda
