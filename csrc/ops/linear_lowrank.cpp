// cora::linear_lowrank: y = x What^T + ((x A^T) * adapter_scale) B^T + bias.
#include "ops/layer.h"

namespace cora {

namespace {

Tensor linear_lowrank_cpu(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int64_t bits, OptTensor a,
                          OptTensor b, OptTensor adapter_scale, OptTensor bias, OptTensor x_scale,
                          OptTensor x_zero_point, int64_t x_bits) {
  const char* op = "linear_lowrank";
  CORA_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got shape []");
  std::vector<int64_t> shape = sizes_of(x);
  const int64_t k = shape.back();
  check_packed(op, "weight", weight, scale, zero_point, bits, k);
  const int64_t n = weight.size(0);
  shape.back() = n;
  LayerArgs args{op, x, weight, scale, zero_point, bits, a, b, adapter_scale, bias, x_scale, x_zero_point, x_bits};
  check_layer(args, n, k, 1);

  args.x = as_contiguous(to_dtype(x, ScalarType::Float));
  Window window{};
  window.batch = x.numel() / k;
  window.channels = k;
  window.size[0] = window.size[1] = 1;
  Tensor y = empty(shape, ScalarType::Float);
  run_layer(args, window, false, mutable_data<float>(y));
  return to_dtype(y, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) { m.impl("linear_lowrank", TORCH_BOX(&linear_lowrank_cpu)); }

}  // namespace cora
