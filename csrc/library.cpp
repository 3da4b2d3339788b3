// Table of contents: the schema of every op. Implementations register themselves in ops/*.cpp;
// documentation, fake kernels and autograd are in cora/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cora, m) {
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int bits, bool residual, bool codes)"
      " -> (Tensor out, Tensor residual, Tensor codes)");
  m.def(
      "fake_quantize_out(Tensor x, Tensor scale, Tensor zero_point, int bits, Tensor(a!) out, Tensor(b!)? residual,"
      " Tensor(c!)? codes) -> ()");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int bits)"
      " -> (Tensor grad_x, Tensor grad_scale)");
  m.def("quantization_error(Tensor x, Tensor scale, Tensor zero_point, int bits) -> Tensor");
  m.def(
      "error_feedback(Tensor x, Tensor scale, Tensor zero_point, int bits, Tensor factor, Tensor order)"
      " -> (Tensor codes, Tensor error)");
  m.def("descend_codes(Tensor codes, Tensor gradient, Tensor scale, Tensor curvature, int bits) -> Tensor");
  m.def("quantize_activation(Tensor x, float scale, int zero_point, int bits, int halo) -> Tensor");
  m.def("dequantize_activation(Tensor codes, float scale, int zero_point, int halo) -> Tensor");
  m.def(
      "max_pool2d_codes(Tensor x, int zero_point, int x_halo, int[2] kernel_size, int[2] stride, int[2] padding,"
      " int[2] dilation, bool ceil_mode, int out_halo) -> Tensor");
  m.def("mean_codes(Tensor x, float scale, int zero_point, int x_halo) -> Tensor");
  m.def("mean_pixels(Tensor x) -> Tensor");
  m.def("pack_bits(Tensor codes, int bits) -> Tensor");
  m.def("unpack_bits(Tensor packed, int bits, int k) -> Tensor");
  m.def("dequantize_packed(Tensor packed, Tensor scale, Tensor zero_point, int bits, int k) -> Tensor");
  m.def(
      "lowrank_factors(Tensor residual, int rank, int groups, Tensor? moment)"
      " -> (Tensor a, Tensor b, Tensor singular_values)");
  m.def(
      "residual_svd_init(Tensor weight, Tensor scale, Tensor zero_point, int bits, int rank, int groups,"
      " Tensor? moment) -> (Tensor packed, Tensor a, Tensor b, Tensor singular_values, Tensor residual)");
  m.def(
      "linear_lowrank(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int bits, Tensor? a,"
      " Tensor? b, Tensor? adapter_scale, Tensor? bias, Tensor? x_scale, Tensor? x_zero_point, int x_bits)"
      " -> Tensor");
  m.def(
      "conv2d_lowrank(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, int bits, int[2] kernel_size,"
      " int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? a, Tensor? b,"
      " Tensor? adapter_scale, Tensor? bias, Tensor? x_scale, Tensor? x_zero_point, int x_bits) -> Tensor");
  m.def(
      "prepare_layer(Tensor codes, Tensor scale, Tensor zero_point, int bits, int channels, int[] kernel_size,"
      " int[] stride, int[] padding, int[] dilation, int groups, Tensor? a, Tensor? b, Tensor? adapter_scale,"
      " Tensor? bias) -> Tensor");
  m.def(
      "run_layer(Tensor x, Tensor layer, int[] geometry, float? x_scale, int x_zero_point, int x_bits, int x_halo,"
      " Tensor? add, float add_scale, int add_zero_point, int add_halo, float clamp_min, float clamp_max,"
      " float? out_scale, int out_zero_point, int out_halo) -> Tensor");
  m.def("run_steps(Tensor[] inputs, Tensor[] layers, Tensor program, Tensor numbers, int[] outputs) -> Tensor[]");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
}
