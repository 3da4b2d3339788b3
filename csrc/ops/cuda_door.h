// The way to libcora_cuda.so: opened on the first call with a CUDA tensor, never before.
#pragma once

#include "check.h"
#include "cuda/api.h"

namespace cora {

/// The library's functions; throws, naming what is missing, when it or the driver is not there.
const cuda::Api& cuda_api(const char* op);

/// torch's current stream on t's device.
void* current_stream(const char* op, const Tensor& t);

/// Throws when `error`, an Api function's result, is not null.
inline void check_cuda(const char* op, const char* error) {
  if (error != nullptr) fail(op, "CUDA: ", error);
}

}  // namespace cora
