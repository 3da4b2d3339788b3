// cora::lowrank_factors, residual_svd_init.
//
// Per group, with R [n, k] the residual and Sxx = M M^T the input's second moment (or M = I), the best
// rank-r B A of R in the norm ||(R - B A) M||_F comes from the SVD of R M = U S V^T:
//   B = U sqrt(S),   A = sqrt(S) V^T M^-1 = S^(-1/2) U^T R.
// The singular vectors are eigenvectors of the Gram matrix on the smaller side, in float64:
//   n <= k:  (R M)(R M)^T = R Sxx R^T -> U, S^2; A by its second form, so M is never needed;
//   n >  k:  (R M)^T (R M) = M^T (R^T R) M -> V, S^2; M = Cholesky factor of Sxx, or its
//            eigenvectors times square roots where that fails.
// Squaring halves the digits of small singular values: 1e-8 of the largest, below float32's own.
// B A is a projection of R whatever the error of S, which only shares the scale between B and A.
#include "bits.h"
#include "check.h"

#include <array>
#include <cmath>

namespace cora {

namespace {

namespace stable = torch::stable;

// --- aten, through the dispatcher -----------------------------------------------------------------

template <size_t kStack, typename... Args>
std::array<StableIValue, kStack> call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, kStack> stack{stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor to_tensor(StableIValue v) { return stable::detail::to<Tensor>(v); }
Tensor transposed(const Tensor& t) { return stable::transpose(t, 1, 2); }

/// Eigenvalues ascending [g, d] and eigenvectors [g, d, d] as columns; both contiguous.
/// Run by one thread: the reduction to tridiagonal form is thousands of tiny parallel regions, which on
/// a busy machine wait for each other's cores (512 x 512: 0.02 s alone, 5 s beside another process).
/// Inside a parallel region LAPACK starts no threads of its own, and the result depends on none.
std::pair<Tensor, Tensor> eigh(const Tensor& symmetric) {
  Tensor values, vectors;
  parallel_for(2, 1, [&](int64_t begin, int64_t) {
    if (begin != 0) return;
    auto stack = call<2>("aten::linalg_eigh", "", symmetric, std::string("L"));
    values = as_contiguous(to_tensor(stack[0]));
    vectors = as_contiguous(to_tensor(stack[1]));
  });
  return {values, vectors};
}

/// M with M M^T = moment, and how to multiply by M^-1 from the right.
struct Root {
  Tensor m, inverse;  // inverse undefined (numel 0): m is lower triangular, solve instead

  Tensor times_inverse(const Tensor& rows) const {
    if (inverse.numel() > 0) return stable::matmul(rows, inverse);
    // X m = rows, m lower triangular.
    auto stack = call<5>("aten::linalg_solve_triangular", "", m, rows, false, false, false);
    return to_tensor(stack[0]);
  }
};

Root square_root(const Tensor& moment) {
  auto stack = call<3>("aten::linalg_cholesky_ex", "", moment, false, false);
  const Tensor factor = to_tensor(stack[0]), info = as_contiguous(to_tensor(stack[1]));
  bool ok = true;
  for (int64_t i = 0; i < info.numel(); ++i) ok = ok && data<int32_t>(info)[i] == 0;
  if (ok) return {factor, empty({0}, ScalarType::Double)};
  const auto [values, vectors] = eigh(moment);
  Tensor m = empty(sizes_of(vectors), ScalarType::Double), inverse_t = empty(sizes_of(vectors), ScalarType::Double);
  const int64_t g = vectors.size(0), k = vectors.size(1);
  for (int64_t i = 0; i < g; ++i) {
    const double* lambda = data<double>(values) + i * k;
    const double floor = std::max(lambda[k - 1] * 1e-14, 1e-300);
    for (int64_t r = 0; r < k; ++r)
      for (int64_t c = 0; c < k; ++c) {
        const int64_t at = (i * k + r) * k + c;
        const double root = std::sqrt(std::max(lambda[c], floor)), v = data<double>(vectors)[at];
        mutable_data<double>(m)[at] = v * root;
        mutable_data<double>(inverse_t)[at] = v / root;
      }
  }
  return {m, as_contiguous(transposed(inverse_t))};
}

// --- The factorisation ----------------------------------------------------------------------------

struct Spectrum {
  Tensor values;   // float32 [g, d], descending
  Tensor vectors;  // float64 [g, d, rank]: leading eigenvectors as columns
};

Spectrum leading(const char* op, const Tensor& gram, int64_t rank) {
  const Tensor dense = as_contiguous(gram);
  for (int64_t i = 0, d = gram.size(1); i < gram.size(0) * d; ++i)
    CORA_CHECK(op, std::isfinite(data<double>(dense)[i * d + i % d]), "residual and moment must be finite");
  const auto [lambda, vectors] = eigh(gram);
  const int64_t g = lambda.size(0), d = lambda.size(1);
  Spectrum s{empty({g, d}, ScalarType::Float), empty({g, d, rank}, ScalarType::Double)};
  for (int64_t i = 0; i < g; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      const double value = data<double>(lambda)[i * d + d - 1 - j];
      mutable_data<float>(s.values)[i * d + j] = static_cast<float>(std::sqrt(std::max(value, 0.0)));
    }
    for (int64_t r = 0; r < d; ++r)
      for (int64_t j = 0; j < rank; ++j)
        mutable_data<double>(s.vectors)[(i * d + r) * rank + j] = data<double>(vectors)[(i * d + r) * d + d - 1 - j];
  }
  return s;
}

/// Column j of every left [n, rank] gets the sign that makes its largest entry positive; returns the signs.
std::vector<double> fix_signs(const Tensor& left) {
  const int64_t g = left.size(0), n = left.size(1), rank = left.size(2);
  std::vector<double> signs(static_cast<size_t>(g * rank), 1.0);
  const double* u = data<double>(left);
  for (int64_t i = 0; i < g; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      double largest = 0;
      for (int64_t r = 0; r < n; ++r) {
        const double value = u[(i * n + r) * rank + j];
        // A margin: entries equal but for rounding must not flip the sign between machines.
        if (std::fabs(value) > std::fabs(largest) * (1 + 1e-9)) largest = value;
      }
      signs[i * rank + j] = largest < 0 ? -1.0 : 1.0;
    }
  return signs;
}

/// out = t with column j (or row j) of group i multiplied by factor[i * rank + j], as float32.
Tensor scaled(const Tensor& t, const std::vector<double>& factor, bool columns) {
  const Tensor source = as_contiguous(t);
  const int64_t g = t.size(0), rows = t.size(1), cols = t.size(2), rank = columns ? cols : rows;
  Tensor out = empty({g * rows, cols}, ScalarType::Float);
  for (int64_t i = 0; i < g; ++i)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t at = (i * rows + r) * cols + c;
        mutable_data<float>(out)[at] =
            static_cast<float>(data<double>(source)[at] * factor[i * rank + (columns ? c : r)]);
      }
  return out;
}

struct Factors {
  Tensor a, b, values;
};

void check_lowrank(const char* op, const char* name, const Tensor& matrix, int64_t n, int64_t k, int64_t rank,
                   int64_t groups, const OptTensor& moment) {
  check_dtype(op, name, matrix, ScalarType::Float);
  CORA_CHECK(op, groups >= 1 && n % groups == 0, "groups must divide the ", n, " rows, got ", groups);
  const int64_t most = std::min(n / groups, k);
  CORA_CHECK(op, rank >= 0 && rank <= most, "rank must be 0..", most, ", got ", rank);
  if (!moment.has_value()) return;
  const ScalarType dtype = moment->scalar_type();
  CORA_CHECK(op, dtype == ScalarType::Float || dtype == ScalarType::Double,
             "moment must have dtype float32 or float64, got ", dtype_text(dtype));
  const bool fits = moment->dim() == 3 && (moment->size(0) == 1 || moment->size(0) == groups) && moment->size(1) == k &&
                    moment->size(2) == k;
  CORA_CHECK(op, fits, "moment must have shape [", groups == 1 ? "1" : "1 or " + std::to_string(groups), ", ", k, ", ",
             k, "], got ", shape_text(*moment));
}

Factors factorise(const char* op, const Tensor& residual, int64_t rank, int64_t groups, const OptTensor& moment) {
  const int64_t n = residual.size(0) / groups, k = residual.size(1), d = std::min(n, k);
  if (d == 0)
    return {empty({groups * rank, k}, ScalarType::Float), empty({n * groups, rank}, ScalarType::Float),
            empty({groups, d}, ScalarType::Float)};
  const int64_t shape[3] = {groups, n, k};
  const Tensor r = stable::reshape(to_dtype(as_contiguous(residual), ScalarType::Double), {shape, 3});
  const bool weighted = moment.has_value();
  const Tensor sxx = weighted ? to_dtype(*moment, ScalarType::Double) : Tensor();
  const bool wide = n <= k;

  Tensor left, right;  // U [g, n, rank], and A before its scale [g, rank, k]
  Spectrum s;
  int left_power = 1;  // twice the power of S still missing in left, and in right
  int right_power = -1;
  if (wide) {
    s = leading(op, stable::matmul(weighted ? stable::matmul(r, sxx) : r, transposed(r)), rank);
    left = s.vectors;
    right = stable::matmul(transposed(left), r);  // U^T R = S V^T M^-1
  } else {
    Tensor gram = stable::matmul(transposed(r), r);
    Root root;
    if (weighted) {
      root = square_root(sxx);
      gram = stable::matmul(stable::matmul(transposed(root.m), gram), root.m);
    }
    s = leading(op, gram, rank);
    const Tensor rm = weighted ? stable::matmul(r, root.m) : r;
    left = as_contiguous(stable::matmul(rm, s.vectors));  // R M V = U S
    right = weighted ? root.times_inverse(transposed(s.vectors)) : transposed(s.vectors);
    left_power = -1;
    right_power = 1;
  }
  const std::vector<double> signs = fix_signs(left);
  std::vector<double> left_scale(signs), right_scale(signs);
  for (int64_t i = 0; i < groups; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      const double value = data<float>(s.values)[i * d + j], first = data<float>(s.values)[i * d];
      // Below 1e-12 of the largest there is nothing but the rounding of an exact zero.
      const bool zero = value <= first * 1e-12 || value < 1e-30;
      left_scale[i * rank + j] *= zero ? 0.0 : std::pow(value, 0.5 * left_power);
      right_scale[i * rank + j] *= zero ? 0.0 : std::pow(value, 0.5 * right_power);
    }
  return {scaled(right, right_scale, false), scaled(left, left_scale, true), s.values};
}

std::tuple<Tensor, Tensor, Tensor> lowrank_factors_cpu(Tensor residual, int64_t rank, int64_t groups,
                                                       OptTensor moment) {
  const char* op = "lowrank_factors";
  CORA_CHECK(op, residual.dim() == 2, "residual must have 2 dimensions, got shape ", shape_text(residual));
  check_lowrank(op, "residual", residual, residual.size(0), residual.size(1), rank, groups, moment);
  Factors f = factorise(op, residual, rank, groups, moment);
  return {f.a, f.b, f.values};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_svd_init_cpu(Tensor weight, Tensor scale, Tensor zero_point,
                                                                         int64_t bits, int64_t rank, int64_t groups,
                                                                         OptTensor moment) {
  const char* op = "residual_svd_init";
  CORA_CHECK(op, weight.dim() >= 2, "weight must have 2 or more dimensions, got shape ", shape_text(weight));
  const int64_t n = weight.size(0);
  int64_t k = 1;
  for (int64_t i = 1; i < weight.dim(); ++i) k *= weight.size(i);
  check_lowrank(op, "weight", weight, n, k, rank, groups, moment);
  check_bits(op, bits);
  check_qparams(op, scale, zero_point, n, k);
  const int64_t shape[2] = {n, k};
  const Tensor matrix = stable::reshape(as_contiguous(weight), {shape, 2});
  auto quantised = call<6>("cora::fake_quantize", "", matrix, scale, zero_point, bits, true, true);
  const Tensor out = to_tensor(quantised[0]), residual = to_tensor(quantised[1]), codes = to_tensor(quantised[2]);
  const Tensor packed = to_tensor(call<2>("cora::pack_bits", "", codes, bits)[0]);
  Factors f = factorise(op, residual, rank, groups, moment);
  return {packed, f.a, f.b, f.values, residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) {
  m.impl("lowrank_factors", TORCH_BOX(&lowrank_factors_cpu));
  m.impl("residual_svd_init", TORCH_BOX(&residual_svd_init_cpu));
}

}  // namespace cora
