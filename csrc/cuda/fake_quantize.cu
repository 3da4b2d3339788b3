// What:     q = clamp(rint(x / scale) + zero_point, 0, 2^bits - 1); out = scale * (q - zero_point);
//           residual = x - out. Backward: grad_x = grad inside the range, else 0; grad_scale = sum of
//           grad * (rint(x/s) - x/s inside, q - zero_point outside).
// Inputs:   x, grad f32 [rows, cols] contiguous; scale f32, zero_point i32 [q_rows, groups].
// Numerics: true division, half to even, no FMA: codes equal the CPU's. The scale gradient is summed in
//           float64 by run in a fixed order (one block a run): deterministic.
// Method:   forward: grid-stride, one element a thread; backward: one block a run of equal scale.
// Cost:     forward 4 B in, 4..9 B out an element; backward 8 B in, 4 B out. Memory-bound.
#include "bits.h"
#include "cuda/api.h"

#include <cuda_runtime.h>

namespace cora::cuda {

namespace {

constexpr int kThreads = 256;

struct Code {
  float q, rounded, ratio;
  bool inside;
};

__device__ Code quantize(float x, float scale, float zero_point, float top) {
  Code c;
  c.ratio = __fdiv_rn(x, scale);
  c.rounded = rintf(c.ratio);
  const float v = c.rounded + zero_point;
  c.inside = v >= 0.0f && v <= top;
  c.q = v > 0.0f ? v : 0.0f;
  c.q = c.q < top ? c.q : top;
  return c;
}

__device__ int64_t scale_index(int64_t row, int64_t col, QuantizeShape s) {
  return (s.q_rows == 1 ? 0 : row) * s.groups + col / (s.cols / s.groups);
}

__global__ void forward_kernel(const float* __restrict__ x, const float* __restrict__ scale,
                               const int32_t* __restrict__ zero_point, QuantizeShape s, float top,
                               float* __restrict__ out, float* __restrict__ residual, uint8_t* __restrict__ codes) {
  const int64_t total = s.rows * s.cols, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t q = scale_index(i / s.cols, i % s.cols, s);
    const float zp = static_cast<float>(zero_point[q]);
    const Code c = quantize(x[i], scale[q], zp, top);
    const float y = scale[q] * (c.q - zp);
    out[i] = y;
    if (residual != nullptr) residual[i] = x[i] - y;
    if (codes != nullptr) codes[i] = static_cast<uint8_t>(c.q);
  }
}

/// Block b owns scale b: its elements are `runs` pieces of `run` columns, one a row (all rows if q_rows is 1).
__global__ void backward_kernel(const float* __restrict__ grad, const float* __restrict__ x,
                                const float* __restrict__ scale, const int32_t* __restrict__ zero_point,
                                QuantizeShape s, float top, float* __restrict__ grad_x,
                                double* __restrict__ grad_scale) {
  __shared__ double partial[kThreads];
  const int64_t run = s.cols / s.groups, first_row = s.q_rows == 1 ? 0 : blockIdx.x / s.groups;
  const int64_t rows = s.q_rows == 1 ? s.rows : 1, first_col = blockIdx.x % s.groups * run;
  const float sc = scale[blockIdx.x], zp = static_cast<float>(zero_point[blockIdx.x]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows * run; i += kThreads) {
    const int64_t at = (first_row + i / run) * s.cols + first_col + i % run;
    const Code c = quantize(x[at], sc, zp, top);
    const float g = grad[at];
    grad_x[at] = c.inside ? g : 0.0f;
    sum += g * (c.inside ? c.rounded - c.ratio : c.q - zp);
  }
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) grad_scale[blockIdx.x] = partial[0];
}

const char* launch_result() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* fake_quantize(const float* x, const float* scale, const int32_t* zero_point, QuantizeShape s, int bits,
                          float* out, float* residual, uint8_t* codes, void* stream) {
  const int64_t total = s.rows * s.cols;
  if (total == 0) return nullptr;
  const int64_t blocks = (total + kThreads - 1) / kThreads;
  forward_kernel<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(x, scale, zero_point, s, static_cast<float>(max_code(bits)),
                                                        out, residual, codes);
  return launch_result();
}

const char* fake_quantize_backward(const float* grad, const float* x, const float* scale, const int32_t* zero_point,
                                   QuantizeShape s, int bits, float* grad_x, double* grad_scale, void* stream) {
  if (s.rows * s.cols == 0) return nullptr;
  backward_kernel<<<static_cast<unsigned>(s.q_rows * s.groups), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      grad, x, scale, zero_point, s, static_cast<float>(max_code(bits)), grad_x, grad_scale);
  return launch_result();
}

}  // namespace

}  // namespace cora::cuda

extern "C" __attribute__((visibility("default"))) const cora::cuda::Api* cora_cuda_get_api() {
  static const cora::cuda::Api api = {cora::cuda::kApiVersion, cora::cuda::fake_quantize,
                                      cora::cuda::fake_quantize_backward};
  return &api;
}
