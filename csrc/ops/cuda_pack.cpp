// pack_bits, unpack_bits, dequantize_packed on CUDA tensors.
#include "bits.h"
#include "ops/cuda_door.h"

namespace cora {

namespace {

int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

Tensor pack_bits_cuda(Tensor codes, int64_t bits) {
  const char* op = "pack_bits";
  check_bits(op, bits);
  check_dtype(op, "codes", codes, ScalarType::Byte);
  CORA_CHECK(op, codes.dim() >= 1, "codes must have at least 1 dimension, got shape []");
  const CudaCall call(op, codes);
  const Tensor source = as_contiguous(codes);
  std::vector<int64_t> shape = sizes_of(codes);
  const int64_t k = shape.back();
  shape.back() = row_bytes(k, static_cast<int>(bits));
  // A code too large would run into its neighbours. Looking waits for the device: packing is done once.
  if (codes.numel() > 0) {
    const Tensor largest = torch::stable::to(torch::stable::amax(torch::stable::flatten(source, 0, -1), 0, false),
                                             torch::stable::Device(torch::headeronly::DeviceType::CPU));
    CORA_CHECK(op, *data<uint8_t>(largest) <= max_code(static_cast<int>(bits)), "codes must be <= ",
               max_code(static_cast<int>(bits)), " for ", bits, " bits, got more");
  }
  Tensor packed = allocate(codes, shape, ScalarType::Byte);
  call.check(call.api.pack(data<uint8_t>(source), rows_of(codes), k, static_cast<int>(bits),
                           mutable_data<uint8_t>(packed), call.stream));
  return packed;
}

Tensor unpack_bits_cuda(Tensor packed, int64_t bits, int64_t k) {
  const char* op = "unpack_bits";
  check_bits(op, bits);
  check_dtype(op, "packed", packed, ScalarType::Byte);
  CORA_CHECK(op, k >= 0, "k must be >= 0, got ", k);
  CORA_CHECK(op, packed.dim() >= 1, "packed must have at least 1 dimension, got shape []");
  const int64_t bytes = row_bytes(k, static_cast<int>(bits));
  std::vector<int64_t> shape = sizes_of(packed);
  CORA_CHECK(op, shape.back() == bytes, "packed must have last dimension ", bytes, " for k = ", k, " and ", bits,
             " bits, got shape ", shape_text(packed));
  shape.back() = k;
  const CudaCall call(op, packed);
  const Tensor source = as_contiguous(packed);
  Tensor codes = allocate(packed, shape, ScalarType::Byte);
  call.check(call.api.unpack(data<uint8_t>(source), rows_of(packed), k, static_cast<int>(bits),
                             mutable_data<uint8_t>(codes), call.stream));
  return codes;
}

Tensor dequantize_packed_cuda(Tensor packed, Tensor scale, Tensor zero_point, int64_t bits, int64_t k) {
  const char* op = "dequantize_packed";
  const QParamShape q = check_packed(op, "packed", packed, scale, zero_point, bits, k);
  const CudaCall call(op, packed);
  const Tensor source = as_contiguous(packed), s = as_contiguous(scale), z = as_contiguous(zero_point);
  Tensor out = allocate(packed, {packed.size(0), k}, ScalarType::Float);
  call.check(call.api.dequantize(data<uint8_t>(source), data<float>(s), data<int32_t>(z),
                                 {packed.size(0), k, q.rows, q.groups}, static_cast<int>(bits),
                                 mutable_data<float>(out), call.stream));
  return out;
}

}  // namespace

CORA_CUDA_LIBRARY(m) {
  m.impl("pack_bits", TORCH_BOX(&pack_bits_cuda));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits_cuda));
  m.impl("dequantize_packed", TORCH_BOX(&dequantize_packed_cuda));
}

}  // namespace cora
