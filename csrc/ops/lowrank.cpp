// cora::lowrank_factors, residual_svd_init.
//
// Per group, with R [n, k] the residual and Sxx = M M^T the input's second moment (or M = I), the best
// rank-r B A of R in the norm ||(R - B A) M||_F comes from the SVD of R M = U S V^T:
//   B = U sqrt(S),   A = sqrt(S) V^T M^-1 = S^(-1/2) U^T R.
// The singular vectors are eigenvectors of the Gram matrix on the smaller side:
//   n <= k:  (R M)(R M)^T = R Sxx R^T -> U, S^2; A by its second form, so M is never needed;
//   n >  k:  (R M)^T (R M) -> V, S^2; M = Cholesky factor of Sxx, or its eigenvectors times square
//            roots where that fails.
// B A is a projection of R whatever the error of S, which only shares the scale between B and A, and the
// energy it captures depends on the vectors' error in second order only. So float64, which is needed for
// singular values far below the largest, is kept for small matrices; large ones are factorised in float32,
// and their singular values measured on the vectors afterwards: |U^T R M| row by row.
#include "bits.h"
#include "check.h"
#include "cpu/kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

// In torch's own library where that is built with MKL, else null.
extern "C" int MKL_Set_Num_Threads_Local(int count) __attribute__((weak));

namespace cora {

namespace {

namespace stable = torch::stable;

constexpr double kFloat32Work = 5e7;  // products in a group's Gram matrix from which on it is made in float32

// --- aten, through the dispatcher -----------------------------------------------------------------

template <size_t kStack, typename... Args>
std::array<StableIValue, kStack> call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, kStack> stack{stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor to_tensor(StableIValue v) { return stable::detail::to<Tensor>(v); }
Tensor transposed(const Tensor& t) { return stable::transpose(t, 1, 2); }

/// While it lives, the calling thread's MKL (where torch has one) starts no threads.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local != nullptr ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

/// Eigenvalues ascending [g, d] and eigenvectors [g, d, d] as rows; both contiguous. Reads the lower triangle.
/// Run by one thread: the reduction to tridiagonal form is thousands of tiny parallel regions, which on
/// a busy machine wait for each other's cores (512 x 512: 0.02 s alone, 5 s beside another process).
/// Not by calling it inside a parallel region, where MKL divides the work for threads it then does not get.
std::pair<Tensor, Tensor> eigh(const Tensor& symmetric) {
  const OneThread one;
  auto stack = call<2>("aten::linalg_eigh", "", symmetric, std::string("L"));
  return {as_contiguous(to_tensor(stack[0])), as_contiguous(transposed(to_tensor(stack[1])))};
}

/// left right^T [g, d, d] where that is symmetric; large ones have their lower triangle only, zeros above.
Tensor symmetric_product(const Tensor& left, const Tensor& right) {
  const int64_t g = left.size(0), d = left.size(1), step = (d + 3) / 4;
  if (d < 128) return stable::matmul(left, transposed(right));
  Tensor out = empty({g, d, d}, left.scalar_type());
  stable::zero_(out);
  for (int64_t begin = 0; begin < d; begin += step) {
    int64_t size = std::min(step, d - begin), end = begin + size;
    Tensor rows = stable::narrow(const_cast<Tensor&>(left), 1, begin, size);
    Tensor until = stable::narrow(const_cast<Tensor&>(right), 1, 0, end);
    Tensor place = stable::narrow(out, 1, begin, size);
    place = stable::narrow(place, 2, 0, end);
    stable::copy_(place, stable::matmul(rows, transposed(until)));
  }
  return out;
}

/// M with M M^T = moment, and how to multiply by M^-1 from the right; float64.
struct Root {
  Tensor m, inverse;  // inverse undefined (numel 0): m is lower triangular, solve instead

  Tensor times_inverse(const Tensor& rows) const {
    const Tensor exact = to_dtype(rows, ScalarType::Double);
    if (inverse.numel() > 0) return to_dtype(stable::matmul(exact, inverse), rows.scalar_type());
    // X m = rows, m lower triangular.
    auto stack = call<5>("aten::linalg_solve_triangular", "", m, exact, false, false, false);
    return to_dtype(to_tensor(stack[0]), rows.scalar_type());
  }
};

Root square_root(const Tensor& moment) {
  auto stack = call<3>("aten::linalg_cholesky_ex", "", moment, false, false);
  const Tensor factor = to_tensor(stack[0]), info = as_contiguous(to_tensor(stack[1]));
  bool ok = true;
  for (int64_t i = 0; i < info.numel(); ++i) ok = ok && data<int32_t>(info)[i] == 0;
  if (ok) return {factor, empty({0}, ScalarType::Double)};
  const auto [values, vectors] = eigh(moment);
  const int64_t g = vectors.size(0), k = vectors.size(1);
  Tensor root = empty({g, k, k}, ScalarType::Double), inverse = empty({g, k, k}, ScalarType::Double);
  const double* v = data<double>(vectors);
  double *forth = mutable_data<double>(root), *back = mutable_data<double>(inverse);
  for (int64_t i = 0; i < g; ++i) {
    const double* lambda = data<double>(values) + i * k;
    const double floor = std::max(lambda[k - 1] * 1e-14, 1e-300);
    for (int64_t r = 0; r < k; ++r) {
      const double scale = std::sqrt(std::max(lambda[r], floor));
      for (int64_t at = (i * k + r) * k; at < (i * k + r + 1) * k; ++at) {
        forth[at] = v[at] * scale;
        back[at] = v[at] / scale;
      }
    }
  }
  return {transposed(root), inverse};  // columns of m, rows of its inverse
}

// --- The factorisation ----------------------------------------------------------------------------

template <typename T>
struct Spectrum {
  std::vector<double> values;  // eigenvalues [g, d], descending
  Tensor vectors;              // T [g, rank, d]: leading eigenvectors as rows
};

template <typename T>
Spectrum<T> leading(const char* op, const Tensor& gram, int64_t rank) {
  const int64_t g = gram.size(0), d = gram.size(1);
  const T* entries = data<T>(gram);
  for (int64_t i = 0; i < g * d; ++i)
    CORA_CHECK(op, std::isfinite(entries[i * d + i % d]), "residual and moment must be finite");
  const auto [lambda, vectors] = eigh(gram);
  Spectrum<T> s{std::vector<double>(static_cast<size_t>(g * d)), empty({g, rank, d}, gram.scalar_type())};
  T* rows = mutable_data<T>(s.vectors);
  for (int64_t i = 0; i < g; ++i) {
    std::reverse_copy(data<T>(lambda) + i * d, data<T>(lambda) + (i + 1) * d, s.values.begin() + i * d);
    for (int64_t j = 0; j < rank; ++j)
      std::copy_n(data<T>(vectors) + (i * d + d - 1 - j) * d, d, rows + (i * rank + j) * d);
  }
  return s;
}

/// 1, or -1 where the row's largest entry is negative.
template <typename T>
double sign_of(const T* row, int64_t count) {
  // A margin: entries equal but for rounding must not flip the sign between machines.
  const double margin = 1 + (std::is_same_v<T, double> ? 1e-9 : 1e-5);
  double largest = 0, size = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = row[i];
    if (std::fabs(value) > size) {
      largest = value;
      size = std::fabs(value) * margin;
    }
  }
  return largest < 0 ? -1.0 : 1.0;
}

template <typename T>
double dot(const T* a, const T* b, int64_t count) {
  double sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(a[i + j]) * b[i + j];
  for (; i < count; ++i) sum[0] += static_cast<double>(a[i]) * b[i];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
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

template <typename T>
Factors factorise_as(const char* op, const Tensor& residual, int64_t rank, int64_t groups, const OptTensor& moment) {
  constexpr ScalarType kType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t n = residual.size(0) / groups, k = residual.size(1), d = std::min(n, k);
  const int64_t shape[3] = {groups, n, k};
  const Tensor r = stable::reshape(to_dtype(as_contiguous(residual), kType), {shape, 3});
  const bool weighted = moment.has_value(), wide = n <= k;

  // Rows: those of `left` become B's columns and those of `right` A's rows. Row j of measure . measured is S_j^2.
  Tensor left, right, measure, measured;  // [g, rank, n], [g, rank, k]
  Spectrum<T> s;
  if (wide) {
    const Tensor rs = weighted ? stable::matmul(r, to_dtype(*moment, kType)) : r;
    s = leading<T>(op, symmetric_product(rs, r), rank);
    left = s.vectors;                 // U^T
    right = stable::matmul(left, r);  // U^T R = S V^T M^-1
    measure = right;
    measured = weighted ? stable::matmul(left, rs) : right;
  } else {
    Root root;
    Tensor rm = r;
    if (weighted) {
      root = square_root(to_dtype(*moment, ScalarType::Double));
      rm = stable::matmul(r, to_dtype(root.m, kType));
    }
    const Tensor columns = transposed(rm);
    s = leading<T>(op, symmetric_product(columns, columns), rank);
    left = stable::matmul(s.vectors, columns);  // V^T (R M)^T = S U^T
    right = weighted ? root.times_inverse(s.vectors) : s.vectors;
    measure = measured = left;
  }
  left = as_contiguous(left), right = as_contiguous(right);
  measure = as_contiguous(measure), measured = as_contiguous(measured);

  Factors f{empty({groups * rank, k}, ScalarType::Float), empty({groups * n, rank}, ScalarType::Float),
            empty({groups, d}, ScalarType::Float)};
  float *values = mutable_data<float>(f.values), *a = mutable_data<float>(f.a), *b = mutable_data<float>(f.b);
  const T *l = data<T>(left), *t = data<T>(right), *m1 = data<T>(measure), *m2 = data<T>(measured);
  const int64_t width = measure.size(2);
  for (double& value : s.values) value = std::sqrt(std::max(value, 0.0));
  parallel_for(groups * rank, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      s.values[i / rank * d + i % rank] = std::sqrt(std::max(dot(m1 + i * width, m2 + i * width, width), 0.0));
  });
  // Measured values of directions that hardly differ need not come in order.
  std::vector<int64_t> order(static_cast<size_t>(groups * rank));
  std::iota(order.begin(), order.end(), 0);
  const auto value_of = [&](int64_t i) -> double& { return s.values[i / rank * d + i % rank]; };
  for (int64_t g = 0; g < groups; ++g) {
    std::stable_sort(order.begin() + g * rank, order.begin() + (g + 1) * rank,
                     [&](int64_t i, int64_t j) { return value_of(i) > value_of(j); });
    for (int64_t j = 0; j < rank; ++j) values[g * d + j] = static_cast<float>(value_of(order[g * rank + j]));
    for (int64_t j = rank; j < d; ++j) {
      const auto value = static_cast<float>(s.values[g * d + j]);
      values[g * d + j] = j > 0 ? std::min(value, values[g * d + j - 1]) : value;
    }
  }
  const Tensor columns = empty({groups * rank, n}, ScalarType::Float);  // of B, as rows
  float* c = mutable_data<float>(columns);
  parallel_for(groups * rank, std::max<int64_t>(1, 16384 / (n + k)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = order[i];
      const double value = value_of(from), first = value_of(order[i / rank * rank]);
      // Below 1e-12 of the largest there is nothing but the rounding of an exact zero.
      const bool zero = value <= first * 1e-12 || value < 1e-30;
      const double sign = zero ? 0.0 : sign_of(l + from * n, n), root = zero ? 0.0 : std::sqrt(value);
      const T up = static_cast<T>(sign * root), down = static_cast<T>(zero ? 0.0 : sign / root);
      for (int64_t j = 0; j < n; ++j) c[i * n + j] = static_cast<float>(l[from * n + j] * (wide ? up : down));
      for (int64_t j = 0; j < k; ++j) a[i * k + j] = static_cast<float>(t[from * k + j] * (wide ? down : up));
    }
  });
  const auto transpose = cpu::k_transpose();
  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) transpose(c + g * rank * n, n, rank, n, b + g * n * rank, rank);
  });
  return f;
}

Factors factorise(const char* op, const Tensor& residual, int64_t rank, int64_t groups, const OptTensor& moment) {
  const int64_t n = residual.size(0) / groups, k = residual.size(1), d = std::min(n, k);
  if (d == 0)
    return {empty({groups * rank, k}, ScalarType::Float), empty({n * groups, rank}, ScalarType::Float),
            empty({groups, d}, ScalarType::Float)};
  const double work = static_cast<double>(n) * k * (moment.has_value() ? k : d);
  return work > kFloat32Work ? factorise_as<float>(op, residual, rank, groups, moment)
                             : factorise_as<double>(op, residual, rank, groups, moment);
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
