// cora::quantization_error: the squared error of a weight under many candidate quantizers, in one pass over it.
#include "bits.h"
#include "check.h"
#include "cpu/kernels.h"

#include <algorithm>

namespace cora {

namespace {

constexpr int64_t kChunk = 4096;  // elements that every candidate visits while they are in L1

Tensor quantization_error_cpu(Tensor x, Tensor scale, Tensor zero_point, int64_t bits) {
  const char* op = "quantization_error";
  check_bits(op, bits);
  check_dtype(op, "x", x, ScalarType::Float);
  CORA_CHECK(op, x.dim() == 2, "x must have 2 dimensions, got shape ", shape_text(x));
  check_dtype(op, "scale", scale, ScalarType::Float);
  check_dtype(op, "zero_point", zero_point, ScalarType::Int);
  const int64_t n = x.size(0), k = x.size(1);
  const bool fits =
      scale.dim() == 3 && (scale.size(1) == 1 || scale.size(1) == n) && scale.size(2) >= 1 && k % scale.size(2) == 0;
  CORA_CHECK(op, fits, "scale must have shape [candidates, ", n == 1 ? "1" : "1 or " + std::to_string(n),
             ", G] with G a divisor of ", k, ", got ", shape_text(scale));
  check_shape(op, "zero_point", zero_point, sizes_of(scale));
  check_qparam_values(op, scale, zero_point);
  const int64_t candidates = scale.size(0), rows = scale.size(1), groups = scale.size(2), run = k / groups;
  const Tensor source = as_contiguous(x), s = as_contiguous(scale), z = as_contiguous(zero_point);
  const Tensor error = empty(sizes_of(scale), ScalarType::Double);

  const auto kernel = cpu::k_squared_error();
  const float top = static_cast<float>(max_code(static_cast<int>(bits)));
  const float *px = data<float>(source), *ps = data<float>(s);
  const int32_t* pz = data<int32_t>(z);
  std::vector<double> sums(static_cast<size_t>(n * groups * candidates));  // a run's candidates side by side
  parallel_for(n * groups, std::max<int64_t>(1, kChunk / run), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t start = 0; start < run; start += kChunk)
        for (int64_t c = 0; c < candidates; ++c) {
          const int64_t at = c * rows * groups + (rows == 1 ? i % groups : i);
          sums[i * candidates + c] +=
              kernel(px + i * run + start, {ps[at], static_cast<float>(pz[at]), top}, std::min(kChunk, run - start));
        }
  });
  double* out = mutable_data<double>(error);
  std::fill_n(out, error.numel(), 0.0);
  for (int64_t i = 0; i < n * groups; ++i)  // in order: any number of threads agrees
    for (int64_t c = 0; c < candidates; ++c)
      out[c * rows * groups + (rows == 1 ? i % groups : i)] += sums[i * candidates + c];
  return error;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) { m.impl("quantization_error", TORCH_BOX(&quantization_error_cpu)); }

}  // namespace cora
