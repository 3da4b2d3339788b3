// What:     codes <-> the packed layout of bits.h, and its values scale * (code - zero_point).
// Method:   eight codes are `bits` bytes: a thread packs or unpacks them as one integer. Run when a model is built.
#include "cuda/pack.cuh"

#include "cuda/elements.cuh"

namespace cora::cuda {

namespace {

constexpr int kThreads = 256;

CORA_GLOBAL(kThreads, 1)
pack_kernel(const uint8_t* __restrict__ codes, const int64_t rows, const int64_t k, const int bits,
            uint8_t* __restrict__ packed) {
  const int64_t octets = (k + 7) / 8, bytes = row_bytes(k, bits);
  for (int64_t i = thread_index(); i < rows * octets; i += thread_count()) {
    const int64_t row = i / octets, first = i % octets * 8;
    uint64_t value = 0;
    for (int j = 0; j < 8 && first + j < k; ++j)
      value |= static_cast<uint64_t>(codes[row * k + first + j] & max_code(bits)) << (j * bits);
    const int64_t at = first / 8 * bits;
    for (int b = 0; b < bits && at + b < bytes; ++b)
      packed[row * bytes + at + b] = static_cast<uint8_t>(value >> (8 * b));
  }
}

CORA_GLOBAL(kThreads, 1)
unpack_kernel(const uint8_t* __restrict__ packed, const int64_t rows, const int64_t k, const int bits,
              uint8_t* __restrict__ codes) {
  const int64_t bytes = row_bytes(k, bits);
  for (int64_t i = thread_index(); i < rows * k; i += thread_count())
    codes[i] = get_code(packed + i / k * bytes, i % k, bits);
}

CORA_GLOBAL(kThreads, 1)
dequantize_kernel(const uint8_t* __restrict__ packed, const float* __restrict__ scale,
                  const int32_t* __restrict__ zero_point, const QuantizeShape s, const int bits,
                  float* __restrict__ out) {
  const int64_t bytes = row_bytes(s.cols, bits), group = s.cols / s.groups;
  for (int64_t i = thread_index(); i < s.rows * s.cols; i += thread_count()) {
    const int64_t row = i / s.cols, column = i % s.cols;
    const int64_t q = (s.q_rows == 1 ? 0 : row) * s.groups + column / group;
    const int code = get_code(packed + row * bytes, column, bits);
    out[i] = scale[q] * static_cast<float>(code - zero_point[q]);
  }
}

}  // namespace

const char* pack(const uint8_t* codes, int64_t rows, int64_t k, int bits, uint8_t* packed, void* stream) {
  if (rows * k == 0) return nullptr;
  return launch(pack_kernel, Dim3{grid_for(rows * ((k + 7) / 8), kThreads), 1, 1}, kThreads, 0, stream, codes, rows, k,
                bits, packed);
}

const char* unpack(const uint8_t* packed, int64_t rows, int64_t k, int bits, uint8_t* codes, void* stream) {
  if (rows * k == 0) return nullptr;
  return launch(unpack_kernel, Dim3{grid_for(rows * k, kThreads), 1, 1}, kThreads, 0, stream, packed, rows, k, bits,
                codes);
}

const char* dequantize(const uint8_t* packed, const float* scale, const int32_t* zero_point, QuantizeShape shape,
                       int bits, float* out, void* stream) {
  if (shape.rows * shape.cols == 0) return nullptr;
  return launch(dequantize_kernel, Dim3{grid_for(shape.rows * shape.cols, kThreads), 1, 1}, kThreads, 0, stream, packed,
                scale, zero_point, shape, bits, out);
}

}  // namespace cora::cuda
