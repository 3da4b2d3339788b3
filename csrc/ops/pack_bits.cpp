// cora::pack_bits, unpack_bits, dequantize_packed: between codes and the packed layout of bits.h.
#include "bits.h"
#include "check.h"
#include "cpu/kernels.h"

#include <algorithm>
#include <atomic>

namespace cora {

namespace {

int64_t grain(int64_t k) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k)); }

Tensor pack_bits_cpu(Tensor codes, int64_t bits) {
  const char* op = "pack_bits";
  const std::vector<int64_t> shape = packed_shape(op, codes, bits);
  const Tensor source = as_contiguous(codes);
  const int64_t k = codes.size(codes.dim() - 1), bytes = shape.back();
  Tensor packed = empty(shape, ScalarType::Byte);
  const auto kernel = cpu::k_pack_row();
  const uint8_t* from = data<uint8_t>(source);
  uint8_t* to = mutable_data<uint8_t>(packed);
  std::atomic<bool> ok{true};
  parallel_for(rows_of(codes), grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (!kernel(from + row * k, k, static_cast<int>(bits), to + row * bytes)) ok = false;
  });
  CORA_CHECK(op, ok, "codes must be <= ", max_code(static_cast<int>(bits)), " for ", bits, " bits, got more");
  return packed;
}

Tensor unpack_bits_cpu(Tensor packed, int64_t bits, int64_t k) {
  const char* op = "unpack_bits";
  const std::vector<int64_t> shape = unpacked_shape(op, packed, bits, k);
  const int64_t bytes = packed.size(packed.dim() - 1);
  const Tensor source = as_contiguous(packed);
  Tensor codes = empty(shape, ScalarType::Byte);
  const auto kernel = cpu::k_unpack_row();
  const uint8_t* from = data<uint8_t>(source);
  uint8_t* to = mutable_data<uint8_t>(codes);
  parallel_for(rows_of(packed), grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernel(from + row * bytes, k, static_cast<int>(bits), to + row * k);
  });
  return codes;
}

Tensor dequantize_packed_cpu(Tensor packed, Tensor scale, Tensor zero_point, int64_t bits, int64_t k) {
  const char* op = "dequantize_packed";
  const QParamShape q = check_packed(op, "packed", packed, scale, zero_point, bits, k);
  const int64_t n = packed.size(0), bytes = packed.size(1);
  const Tensor source = as_contiguous(packed), s = as_contiguous(scale), z = as_contiguous(zero_point);
  Tensor out = empty({n, k}, ScalarType::Float);
  const auto unpack = cpu::k_unpack_row();
  const auto dequantize = cpu::k_dequantize();
  const uint8_t* from = data<uint8_t>(source);
  const float* ps = data<float>(s);
  const int32_t* pz = data<int32_t>(z);
  float* to = mutable_data<float>(out);
  parallel_for(n, grain(k), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(static_cast<size_t>(k));
    for (int64_t row = begin; row < end; ++row) {
      unpack(from + row * bytes, k, static_cast<int>(bits), codes.data());
      const int64_t first = q.rows == 1 ? 0 : row * q.groups;
      for (int64_t g = 0; g < q.groups; ++g)
        dequantize(codes.data() + g * q.group_size, ps[first + g], pz[first + g], q.group_size,
                   to + row * k + g * q.group_size);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&pack_bits_cpu));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits_cpu));
  m.impl("dequantize_packed", TORCH_BOX(&dequantize_packed_cpu));
}

}  // namespace cora
