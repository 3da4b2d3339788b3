// GEMM on bfloat16 x; the kernel is in gemm.cuh.
#include "cuda/gemm_configs.cuh"

namespace cora::cuda {

const char* gemm_bfloat16(int container, int tile, const GemmArgs& args, void* stream) {
  return dispatch16<Bfloat16>(container, tile, args, stream);
}

}  // namespace cora::cuda
