// GEMM on 8-bit codes; the kernel is in gemm.cuh.
#include "cuda/gemm_configs.cuh"

namespace cora::cuda {

const char* gemm_int8(int container, int tile, const GemmArgs& args, void* stream) {
  return tile == kSmall8 ? with_container<Small8, Int8>(container, args, stream)
                         : with_container<Large8, Int8>(container, args, stream);
}

}  // namespace cora::cuda
