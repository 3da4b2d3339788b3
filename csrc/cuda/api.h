// The door between _C.so and libcora_cuda.so: one exported function, raw pointers, no torch and no
// C++ types, so that the library needs nothing but the driver and _C.so runs without it.
#pragma once

#include <cstdint>

namespace cora::cuda {

constexpr int kApiVersion = 1;

/// Matrix x seen as [rows, cols] with scale and zero_point [q_rows, groups]; q_rows is 1 or rows.
struct QuantizeShape {
  int64_t rows, cols, q_rows, groups;
};

/// Every function returns null, or a static text that says what failed.
struct Api {
  int version;
  const char* (*fake_quantize)(const float* x, const float* scale, const int32_t* zero_point, QuantizeShape shape,
                               int bits, float* out, float* residual /*or null*/, uint8_t* codes /*or null*/,
                               void* stream);
  /// grad_scale [q_rows, groups] as float64, zeroed by the caller.
  const char* (*fake_quantize_backward)(const float* grad, const float* x, const float* scale,
                                        const int32_t* zero_point, QuantizeShape shape, int bits, float* grad_x,
                                        double* grad_scale, void* stream);
};

}  // namespace cora::cuda
