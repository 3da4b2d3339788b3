// cora::error_feedback: a weight rounded column by column, each column's error passed on to those not yet rounded.
// With H the input's second moment and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), in the order of the columns:
//   e_k = (w_k - round(w_k)) / U_kk;   w_j -= e_k U_kj for j > k
// is the best that the later columns can do for the output error ||(W - What) H^(1/2)||^2, which is sum_k e_k^2.
// Rows do not see each other: blocks of them go to the threads, and any number of threads gives the same codes.
// Cost: N K^2 / 2 products and differences. Source: GPTQ, Frantar et al. 2022, arXiv 2210.17323.
#include "bits.h"
#include "check.h"
#include "cpu/kernels.h"

#include <algorithm>

namespace cora {

namespace {

std::tuple<Tensor, Tensor> error_feedback_cpu(Tensor x, Tensor scale, Tensor zero_point, int64_t bits, Tensor factor,
                                              Tensor order) {
  const char* op = "error_feedback";
  check_bits(op, bits);
  check_dtype(op, "x", x, ScalarType::Float);
  CORA_CHECK(op, x.dim() == 2, "x must have 2 dimensions, got shape ", shape_text(x));
  const int64_t n = x.size(0), k = x.size(1);
  const QParamShape q = check_qparams(op, scale, zero_point, n, k);
  check_qparam_values(op, scale, zero_point);
  check_dtype(op, "factor", factor, ScalarType::Float);
  const int64_t groups = factor.dim() == 3 ? factor.size(0) : 0;
  CORA_CHECK(op, groups > 0 && n % groups == 0 && factor.size(1) == k && factor.size(2) == k,
             "factor must have shape [groups, ", k, ", ", k, "] with groups a divisor of ", n, ", got ",
             shape_text(factor));
  check_dtype(op, "order", order, ScalarType::Long);
  check_shape(op, "order", order, {groups, k});
  const Tensor source = as_contiguous(x), s = as_contiguous(scale), z = as_contiguous(zero_point);
  const Tensor u = as_contiguous(factor), columns = as_contiguous(order);
  const auto* po = data<int64_t>(columns);
  const float *px = data<float>(source), *ps = data<float>(s), *pu = data<float>(u);
  for (int64_t g = 0; g < groups; ++g) {
    std::vector<bool> seen(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = po[g * k + i];
      const float diagonal = pu[(g * k + i) * k + i];
      CORA_CHECK(op, at >= 0 && at < k && !seen[static_cast<size_t>(at)], "order must hold each of 0..", k - 1,
                 " once, got ", at, " at ", i);
      CORA_CHECK(op, diagonal > 0, "factor must have a diagonal > 0, got ", diagonal, " at ", i);
      seen[static_cast<size_t>(at)] = true;
    }
  }
  const Tensor codes = empty({n, k}, ScalarType::Byte), error = empty({n}, ScalarType::Double);

  const auto kernel = cpu::k_feedback();
  const float top = static_cast<float>(max_code(static_cast<int>(bits)));
  const auto* pz = data<int32_t>(z);
  auto* pc = mutable_data<uint8_t>(codes);
  auto* pe = mutable_data<double>(error);
  constexpr int kRows = cpu::kFeedbackRows, kBlock = cpu::kFeedbackBlock;
  const int64_t group_rows = n / groups, blocks = (group_rows + kRows - 1) / kRows;
  parallel_for(groups * blocks, 1 + 65536 / (k * k + 1), [&](int64_t begin, int64_t end) {
    // Lanes without a row are computed too, with what was in them.
    std::vector<float> w(static_cast<size_t>(kRows * k));
    std::vector<float> scales(kRows * kBlock, 1.0f), zeros(kRows * kBlock), quantized(kRows * kBlock),
        errors(kRows * kBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t group = block / blocks, first = group * group_rows + block % blocks * kRows;
      const int rows = static_cast<int>(std::min<int64_t>(kRows, (group + 1) * group_rows - first));
      const int64_t* at = po + group * k;
      double sums[kRows] = {};
      for (int r = 0; r < rows; ++r)
        for (int64_t i = 0; i < k; ++i) w[i * kRows + r] = px[(first + r) * k + at[i]];
      for (int64_t start = 0; start < k; start += kBlock) {
        const int width = static_cast<int>(std::min<int64_t>(kBlock, k - start));
        for (int i = 0; i < width; ++i) {
          const int64_t run = (q.rows == 1 ? 0 : first * q.groups) + at[start + i] / q.group_size;
          for (int r = 0; r < rows; ++r) {
            const int64_t from = run + (q.rows == 1 ? 0 : r * q.groups);
            scales[i * kRows + r] = ps[from];
            zeros[i * kRows + r] = static_cast<float>(pz[from]);
          }
        }
        kernel(w.data() + start * kRows, rows, pu + (group * k + start) * k + start, k, width, k - start - width,
               scales.data(), zeros.data(), top, quantized.data(), errors.data());
        for (int i = 0; i < width; ++i)
          for (int r = 0; r < rows; ++r) {
            const double e = errors[i * kRows + r];
            pc[(first + r) * k + at[start + i]] = static_cast<uint8_t>(quantized[i * kRows + r]);
            sums[r] += e * e;
          }
      }
      std::copy_n(sums, rows, pe + first);
    }
  });
  return {codes, error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) { m.impl("error_feedback", TORCH_BOX(&error_feedback_cpu)); }

}  // namespace cora
