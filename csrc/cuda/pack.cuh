// Between codes and the packed layout; see pack.cu.
#pragma once

#include "cuda/api.h"

namespace cora::cuda {

const char* pack(const uint8_t* codes, int64_t rows, int64_t k, int bits, uint8_t* packed, void* stream);
const char* unpack(const uint8_t* packed, int64_t rows, int64_t k, int bits, uint8_t* codes, void* stream);
const char* dequantize(const uint8_t* packed, const float* scale, const int32_t* zero_point, QuantizeShape shape,
                       int bits, float* out, void* stream);

}  // namespace cora::cuda
