// GEMM on float16 x; the kernel is in gemm.cuh.
#include "cuda/gemm_configs.cuh"

namespace cora::cuda {

const char* gemm_half(int container, int tile, const GemmArgs& args, void* stream) {
  return dispatch16<Half>(container, tile, args, stream);
}

}  // namespace cora::cuda
