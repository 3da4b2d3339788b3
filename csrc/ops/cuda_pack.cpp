// pack_bits, unpack_bits, dequantize_packed on CUDA tensors.
#include "bits.h"
#include "ops/cuda_door.h"

namespace cora {

namespace {

Tensor pack_bits_cuda(Tensor codes, int64_t bits) {
  const char* op = "pack_bits";
  const std::vector<int64_t> shape = packed_shape(op, codes, bits);
  const CudaCall call(op, codes);
  const Tensor source = as_contiguous(codes);
  const int64_t k = codes.size(codes.dim() - 1);
  // A code too large would run into its neighbours. Looking waits for the device: packing is done once.
  if (codes.numel() > 0) {
    const Tensor largest = torch::stable::to(torch::stable::amax(torch::stable::flatten(source, 0, -1), 0, false),
                                             torch::stable::Device(torch::headeronly::DeviceType::CPU));
    CORA_CHECK(op, *data<uint8_t>(largest) <= max_code(static_cast<int>(bits)),
               "codes must be <= ", max_code(static_cast<int>(bits)), " for ", bits, " bits, got more");
  }
  Tensor packed = allocate(codes, shape, ScalarType::Byte);
  call.check(call.api.pack(data<uint8_t>(source), rows_of(codes), k, static_cast<int>(bits),
                           mutable_data<uint8_t>(packed), call.stream));
  return packed;
}

Tensor unpack_bits_cuda(Tensor packed, int64_t bits, int64_t k) {
  const char* op = "unpack_bits";
  const std::vector<int64_t> shape = unpacked_shape(op, packed, bits, k);
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
