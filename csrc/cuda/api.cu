// The one symbol libcora_cuda.so exports.
#include "cuda/api.h"

#include "cuda/fake_quantize.cuh"
#include "cuda/layer.cuh"
#include "cuda/pack.cuh"
#include "cuda/platform.cuh"
#include "cuda/prepare.cuh"
#include "cuda/stage.cuh"

namespace cora::cuda {

namespace {

/// Stands for all kernels: they are compiled for the same architectures.
CORA_GLOBAL(32, 1) empty_kernel() {}

const char* check_device() {
  Device device;
  if (const char* error = query(&device)) return error;
  if (device.major < 8) return "the GPU has compute capability below 8.0 (needs Ampere or newer)";
  return has_code(empty_kernel);
}

}  // namespace

const Api& library_api() {
  static const Api api = {kApiVersion, check_device, fake_quantize, quantize_parts, fake_quantize_backward,
                          pack,        unpack,       dequantize,    prepare,        plan,
                          run,         values_bytes, values,        finish,         merge};
  return api;
}

}  // namespace cora::cuda

#if !defined(CORA_EMULATED)
extern "C" __attribute__((visibility("default"))) const cora::cuda::Api* cora_cuda_get_api() {
  return &cora::cuda::library_api();
}
#endif
