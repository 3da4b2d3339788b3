// Fake quantization; see fake_quantize.cu.
#pragma once

#include "cuda/api.h"

namespace cora::cuda {

const char* fake_quantize(const void* x, int type, const float* scale, const int32_t* zero_point, QuantizeShape shape,
                          int bits, void* out, void* residual, uint8_t* codes, void* stream);
int64_t quantize_parts(QuantizeShape shape);
const char* fake_quantize_backward(const void* grad, const void* x, int type, const float* scale,
                                   const int32_t* zero_point, QuantizeShape shape, int bits, void* grad_x,
                                   float* grad_scale, double* partial, void* stream);

}  // namespace cora::cuda
