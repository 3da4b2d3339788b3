// The way to libcora_cuda.so: opened on the first call with a CUDA tensor, never before.
//
// The ops of cuda_*.cpp are also built against the emulator (csrc/emu), for CPU tensors under the name cora_emu; the
// macros and functions here are all that differs.
#pragma once

#include "check.h"
#include "cuda/api.h"

#include <optional>

#if defined(CORA_EMULATED)
#define CORA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(cora_emu, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define CORA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(cora, CUDA, m)
#endif

namespace cora {

/// The library's functions; throws, naming what is missing, when it or the driver is not there.
const cuda::Api& cuda_api(const char* op);

/// torch's current stream on t's device.
void* current_stream(const char* op, const Tensor& t);

/// Makes t's device the current one, and hands out what a call on it needs.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& t);

  const cuda::Api& api;
  void* const stream;

  /// Throws when `error`, an Api function's result, is not null.
  void check(const char* error) const {
    if (error != nullptr) fail(op_, "CUDA: ", error);
  }

 private:
  const char* op_;
#if !defined(CORA_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

/// Uninitialised, on x's device; an image may lie channels-last.
Tensor allocate(const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last = false);

/// Strides of an image [batch, channels, height, width]; a size of 1 gets that of a channels-last one.
cuda::PixelStrides pixel_strides(const Tensor& image);

/// The Api's code of a dtype; kFloat32 .. kInt8.
int element_type(ScalarType dtype);

}  // namespace cora
