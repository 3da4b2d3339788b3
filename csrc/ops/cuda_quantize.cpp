// fake_quantize, its backward, and codes of activations, on CUDA tensors. Values of scale and zero_point are not
// checked, as on the CPU: reading them would wait for the device.
#include "bits.h"
#include "ops/cuda_door.h"

#include <cmath>

namespace cora {

namespace {

cuda::QuantizeShape check_fake_quantize(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                        int64_t bits) {
  check_bits(op, bits);
  check_float(op, "x", x);
  check_same_device(op, "scale", scale, x);
  const int64_t rows = x.dim() >= 2 ? x.size(0) : 1;
  int64_t cols = x.dim() >= 2 ? 1 : x.numel();
  for (int64_t d = 1; d < x.dim(); ++d) cols *= x.size(d);
  const QParamShape q = check_qparams(op, scale, zero_point, rows, cols);
  return {rows, cols, q.rows, q.groups};
}

void run_fake_quantize(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t bits,
                       Tensor& out, Tensor* residual, Tensor* codes) {
  const cuda::QuantizeShape shape = check_fake_quantize(op, x, scale, zero_point, bits);
  const CudaCall call(op, x);
  const Tensor source = as_contiguous(x), s = as_contiguous(scale), z = as_contiguous(zero_point);
  call.check(call.api.fake_quantize(source.const_data_ptr(), element_type(x.scalar_type()), data<float>(s),
                                    data<int32_t>(z), shape, static_cast<int>(bits), out.mutable_data_ptr(),
                                    residual != nullptr ? residual->mutable_data_ptr() : nullptr,
                                    codes != nullptr ? mutable_data<uint8_t>(*codes) : nullptr, call.stream));
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_cuda(Tensor x, Tensor scale, Tensor zero_point, int64_t bits,
                                                      bool want_residual, bool want_codes) {
  const std::vector<int64_t> shape = sizes_of(x), none{0};
  Tensor out = allocate(x, shape, x.scalar_type());
  Tensor residual = allocate(x, want_residual ? shape : none, x.scalar_type());
  Tensor codes = allocate(x, want_codes ? shape : none, ScalarType::Byte);
  run_fake_quantize("fake_quantize", x, scale, zero_point, bits, out, want_residual ? &residual : nullptr,
                    want_codes ? &codes : nullptr);
  return {out, residual, codes};
}

void fake_quantize_out_cuda(Tensor x, Tensor scale, Tensor zero_point, int64_t bits, Tensor out, OptTensor residual,
                            OptTensor codes) {
  const char* op = "fake_quantize_out";
  check_dtype(op, "x", x, ScalarType::Float);
  const auto check_out = [&](const char* name, const Tensor& t, ScalarType dtype) {
    check_dtype(op, name, t, dtype);
    check_shape(op, name, t, sizes_of(x));
    check_same_device(op, name, t, x);
    CORA_CHECK(op, t.is_contiguous(), name, " must be contiguous, got shape ", shape_text(t), " in another layout");
  };
  check_out("out", out, ScalarType::Float);
  if (residual.has_value()) check_out("residual", *residual, ScalarType::Float);
  if (codes.has_value()) check_out("codes", *codes, ScalarType::Byte);
  run_fake_quantize(op, x, scale, zero_point, bits, out, residual.has_value() ? &*residual : nullptr,
                    codes.has_value() ? &*codes : nullptr);
}

std::tuple<Tensor, Tensor> fake_quantize_backward_cuda(Tensor grad, Tensor x, Tensor scale, Tensor zero_point,
                                                       int64_t bits) {
  const char* op = "fake_quantize_backward";
  const cuda::QuantizeShape shape = check_fake_quantize(op, x, scale, zero_point, bits);
  check_shape(op, "grad", grad, sizes_of(x));
  check_same_device(op, "grad", grad, x);
  const CudaCall call(op, x);
  const Tensor source = as_contiguous(x), g = as_contiguous(to_dtype(grad, x.scalar_type()));
  const Tensor s = as_contiguous(scale), z = as_contiguous(zero_point);
  Tensor grad_x = allocate(x, sizes_of(x), x.scalar_type());
  Tensor grad_scale = allocate(x, sizes_of(scale), ScalarType::Float);
  Tensor partial = allocate(x, {call.api.quantize_parts(shape)}, ScalarType::Double);
  call.check(call.api.fake_quantize_backward(g.const_data_ptr(), source.const_data_ptr(), element_type(x.scalar_type()),
                                             data<float>(s), data<int32_t>(z), shape, static_cast<int>(bits),
                                             grad_x.mutable_data_ptr(), mutable_data<float>(grad_scale),
                                             mutable_data<double>(partial), call.stream));
  return {grad_x, grad_scale};
}

// --- Codes of activations -------------------------------------------------------------------------------------------

Tensor quantize_activation_cuda(Tensor x, double scale, int64_t zero_point, int64_t bits, int64_t halo) {
  const char* op = "quantize_activation";
  check_bits(op, bits);
  check_float(op, "x", x);
  const int top = max_code(static_cast<int>(bits));
  check_activation(op, "x", x, scale, zero_point, top, halo);
  const CudaCall call(op, x);
  const bool image = x.dim() == 4;
  const Tensor source = image ? x : as_contiguous(x);
  std::vector<int64_t> shape = sizes_of(x);
  if (image) shape[2] += 2 * halo, shape[3] += 2 * halo;
  Tensor out = allocate(x, shape, ScalarType::Byte, image);
  const cuda::PixelStrides from = image ? pixel_strides(source) : cuda::PixelStrides{0, 0, 1, 1};
  cuda::Epilogue e{};
  e.out_strides = image ? pixel_strides(out) : from;
  e.out = mutable_data<uint8_t>(out) + halo * (e.out_strides.row + e.out_strides.pixel);
  e.out_type = cuda::kUint8;
  e.out_scale = static_cast<float>(scale);
  e.out_zero = static_cast<int32_t>(zero_point);
  e.out_top = top;
  e.low = -INFINITY;
  e.high = INFINITY;
  const auto size = [&](int64_t d) { return static_cast<int>(image ? x.size(d) : 1); };
  CORA_CHECK(op, x.numel() <= INT32_MAX, "x must have at most 2^31 - 1 elements, got ", x.numel());
  if (out.numel() == 0) return out;
  if (image && halo > 0)
    e.border = {mutable_data<uint8_t>(out), size(0),   static_cast<int>(shape[2]), static_cast<int>(shape[3]), size(1),
                static_cast<int>(halo),     e.out_zero};
  call.check(call.api.finish(source.const_data_ptr(), element_type(x.scalar_type()), from, size(0), size(2),
                             image ? size(3) : static_cast<int>(x.numel()), size(1), nullptr, e, call.stream));
  return out;
}

Tensor dequantize_activation_cuda(Tensor codes, double scale, int64_t zero_point, int64_t halo) {
  const char* op = "dequantize_activation";
  check_dtype(op, "codes", codes, ScalarType::Byte);
  check_activation(op, "codes", codes, scale, zero_point, max_code(kMaxBits), halo);
  const bool image = codes.dim() == 4;
  std::vector<int64_t> shape = sizes_of(codes);
  if (image) {
    shape[2] -= 2 * halo, shape[3] -= 2 * halo;
    CORA_CHECK(op, shape[2] >= 0 && shape[3] >= 0, "codes must hold the border of ", halo, " pixels, got shape ",
               shape_text(codes));
    CORA_CHECK(op, is_channels_last(codes) || codes.numel() == 0, "codes must be channels_last, got another layout");
  }
  const CudaCall call(op, codes);
  const Tensor source = image ? codes : as_contiguous(codes);
  Tensor out = allocate(codes, shape, ScalarType::Float, image);
  if (out.numel() == 0) return out;
  CORA_CHECK(op, codes.numel() <= INT32_MAX, "codes must have at most 2^31 - 1 elements, got ", codes.numel());
  // Channels-last out is the transpose of what `values` writes: one item a line of channels does it.
  cuda::Input x{};
  x.type = cuda::kUint8;
  x.parameters = cuda::kOnHost;
  x.host_scale = static_cast<float>(scale);
  x.host_zero_point = static_cast<int32_t>(zero_point);
  x.items = static_cast<int32_t>(image ? shape[0] : 1);
  x.height = static_cast<int32_t>(image ? shape[2] : 1);
  x.width = static_cast<int32_t>(image ? shape[3] * shape[1] : codes.numel());
  const cuda::PixelStrides s = image ? pixel_strides(codes) : cuda::PixelStrides{0, 0, 1, 1};
  // A line of an image, all its channels, is contiguous: seen as one channel.
  x.strides = {s.item, s.row, 1, 1};
  x.data = data<uint8_t>(source) + halo * (s.row + s.pixel);
  Tensor workspace = allocate(codes, {call.api.values_bytes(x, 1)}, ScalarType::Byte);
  call.check(call.api.values(x, 1, mutable_data<float>(out), mutable_data<uint8_t>(workspace), call.stream));
  return out;
}

}  // namespace

CORA_CUDA_LIBRARY(m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cuda));
  m.impl("fake_quantize_out", TORCH_BOX(&fake_quantize_out_cuda));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cuda));
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_cuda));
  m.impl("dequantize_activation", TORCH_BOX(&dequantize_activation_cuda));
}

}  // namespace cora
