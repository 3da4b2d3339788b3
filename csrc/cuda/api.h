// The door between _C.so and libcora_cuda.so: one exported function, raw pointers, no torch and no
// C++ types, so that the library needs nothing but the driver and _C.so runs without it.
#pragma once

#include "cuda/layout.h"

#include <cstdint>

namespace cora::cuda {

constexpr int kApiVersion = 5;

/// Matrix x seen as [rows, cols] with scale and zero_point [q_rows, groups]; q_rows is 1 or rows.
struct QuantizeShape {
  int64_t rows, cols, q_rows, groups;
};

/// A layer as the file has it; all on the device and contiguous.
struct LayerParameters {
  const uint8_t* codes;       // [n, row_bytes]
  const float* scale;         // [q_rows, q_groups]
  const int32_t* zero_point;  // the same
  const void *a, *b;          // [groups * rank, k], [n, rank]; int8, float32, float16 or bfloat16; null without adapter
  const float* adapter_scale;  // [groups * rank] or null
  const float* bias;           // [n] or null
};

/// Where the quantizer of x comes from (float x with x_bits > 0, or 8-bit codes).
enum XParameters : int32_t { kNoParameters = 0, kDynamic, kOnDevice, kOnHost };

/// x [items, height, width, channels] by strides. A matrix [m, k] is m items of one pixel.
struct Input {
  const void* data;
  int32_t type;          // kFloat32, kFloat16, kBfloat16; kUint8: codes
  PixelStrides strides;  // elements
  int32_t items, height, width;
  int32_t halo;    // codes: border pixels around each image that hold zero_point; height and width are without it
  int32_t x_bits;  // 0: float arithmetic
  int32_t parameters;
  const float* scale;         // kOnDevice
  const int32_t* zero_point;  // kOnDevice
  float host_scale;           // kOnHost
  int32_t host_zero_point;
};

enum Method : int32_t { kTensorCores16 = 0, kTensorCores8, kMerge };

/// How a call will run, and where its temporaries lie in the workspace.
struct Plan {
  int32_t method;
  int32_t tokens, out_height, out_width;
  int32_t tile, stages, tiles, workers, t_splits;
  bool fused, staged, early;
  int32_t staged_channels;
  int64_t x_at, ranges_at, x_scale_at, x_zero_at, t_at, partial_at, tickets_at, bytes;
};

/// Every function returns null, or a static text that says what failed. All work is put on `stream`; none waits.
struct Api {
  int version;
  /// Null if the current device runs these kernels.
  const char* (*check_device)();
  const char* (*fake_quantize)(const void* x, int type, const float* scale, const int32_t* zero_point,
                               QuantizeShape shape, int bits, void* out, void* residual /*or null*/,
                               uint8_t* codes /*or null*/, void* stream);
  /// partial: float64 [quantize_parts(shape)], scratch.
  int64_t (*quantize_parts)(QuantizeShape shape);
  const char* (*fake_quantize_backward)(const void* grad, const void* x, int type, const float* scale,
                                        const int32_t* zero_point, QuantizeShape shape, int bits, void* grad_x,
                                        float* grad_scale, double* partial, void* stream);
  const char* (*pack)(const uint8_t* codes, int64_t rows, int64_t k, int bits, uint8_t* packed, void* stream);
  const char* (*unpack)(const uint8_t* packed, int64_t rows, int64_t k, int bits, uint8_t* codes, void* stream);
  const char* (*dequantize)(const uint8_t* packed, const float* scale, const int32_t* zero_point, QuantizeShape shape,
                            int bits, float* out, void* stream);
  /// prepared: parts_of(shape).bytes, 16-byte aligned.
  const char* (*prepare)(const LayerShape& shape, const LayerParameters& parameters, uint8_t* prepared, void* stream);
  const char* (*plan)(const LayerShape& shape, const Input& x, Plan* plan);
  /// workspace: plan.bytes; plan.method must not be kMerge.
  const char* (*run)(const LayerShape& shape, const uint8_t* prepared, const Input& x, const Plan& plan,
                     const Epilogue& epilogue, uint8_t* workspace, void* stream);
  /// For the paths that end in torch's own operators: x as float32, contiguous [items, channels, height, width],
  /// quantized and dequantized if x_bits > 0 or x is codes; workspace: values_bytes(x, channels).
  int64_t (*values_bytes)(const Input& x, int channels);
  const char* (*values)(const Input& x, int channels, float* out, uint8_t* workspace, void* stream);
  /// epilogue of y [items, height, width, channels] by strides, computed elsewhere, plus bias (or null), which is
  /// 16-byte aligned. epilogue.out may be y.
  const char* (*finish)(const void* y, int type, PixelStrides strides, int items, int height, int width, int channels,
                        const float* bias, const Epilogue& epilogue, void* stream);
  /// The weight with its adapter merged in, [n, channels / groups, kernel] (channels last: merges_by_tiles), and the
  /// bias (unless null) as `type`.
  const char* (*merge)(const LayerShape& shape, const uint8_t* prepared, void* out, void* bias, int type, void* stream);
};

/// What libcora_cuda.so hands out; the emulated ops are built with it, and call it by this name, which no other library
/// of the process can give another meaning.
const Api& library_api();

}  // namespace cora::cuda
