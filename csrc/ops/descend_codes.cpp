// cora::descend_codes: coordinate descent of a quadratic error over some columns' codes.
// With the error's gradient g = E H of a row, E = W - s (c - z), the best code for column k while all others stay is
//   c_k + g_k / (s_k H_kk), rounded and clamped; then g_j -= s_k (change of c_k) H_kj for the columns after it.
// Rows do not see each other: they go to the threads. A code that stays, as most do, costs a division.
#include "bits.h"
#include "check.h"

#include <algorithm>
#include <cmath>

namespace cora {

namespace {

Tensor descend_codes_cpu(Tensor codes, Tensor gradient, Tensor scale, Tensor curvature, int64_t bits) {
  const char* op = "descend_codes";
  check_bits(op, bits);
  check_dtype(op, "codes", codes, ScalarType::Double);
  CORA_CHECK(op, codes.dim() == 3, "codes must have 3 dimensions, got shape ", shape_text(codes));
  const int64_t groups = codes.size(0), rows = codes.size(1), columns = codes.size(2);
  check_dtype(op, "gradient", gradient, ScalarType::Double);
  check_shape(op, "gradient", gradient, sizes_of(codes));
  check_dtype(op, "scale", scale, ScalarType::Double);
  check_shape(op, "scale", scale, sizes_of(codes));
  check_dtype(op, "curvature", curvature, ScalarType::Double);
  check_shape(op, "curvature", curvature, {groups, columns, columns});
  const Tensor from = as_contiguous(codes), slope = as_contiguous(gradient), steps = as_contiguous(scale);
  const Tensor bent = as_contiguous(curvature), to = empty(sizes_of(codes), ScalarType::Double);
  const double *pc = data<double>(from), *pg = data<double>(slope), *ps = data<double>(steps), *ph = data<double>(bent);
  double* out = mutable_data<double>(to);
  const double top = max_code(static_cast<int>(bits));
  parallel_for(groups * rows, 1 + 32768 / (columns * columns + 1), [&](int64_t begin, int64_t end) {
    std::vector<double> left(static_cast<size_t>(columns));
    for (int64_t r = begin; r < end; ++r) {
      const double *s = ps + r * columns, *h = ph + r / rows * columns * columns;
      std::copy_n(pg + r * columns, columns, left.begin());
      for (int64_t k = 0; k < columns; ++k, h += columns) {
        const double code = pc[r * columns + k], wanted = std::nearbyint(code + left[k] / (s[k] * h[k]));
        const double now = wanted >= 0 ? std::min(wanted, top) : 0;  // a NaN too
        out[r * columns + k] = now;
        if (now == code) continue;
        const double change = s[k] * (now - code);
        for (int64_t j = k + 1; j < columns; ++j) left[j] -= change * h[j];
      }
    }
  });
  return to;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) { m.impl("descend_codes", TORCH_BOX(&descend_codes_cpu)); }

}  // namespace cora
