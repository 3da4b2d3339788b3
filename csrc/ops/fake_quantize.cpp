// cora::fake_quantize and its backward: checks, allocation, division of the work.
#include "bits.h"
#include "check.h"
#include "cpu/kernels.h"

#include <algorithm>
#include <atomic>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cora {

namespace {

constexpr int64_t kChunk = 16384;  // elements a task: 64 KiB in, the same out, within L2
// Outputs of this size or more lie beyond the caches. Given ones are stored past these, where a store would first read
// the line. New ones are memory just mapped: the system zeroes its pages, and so brings them into the caches, right
// before the store.
constexpr int64_t kLargeBytes = 32 << 20;

/// Has the system map all pages of new memory that is about to be written, in one call a chunk: page faults one by one
/// cost more than the arithmetic. Where the system cannot, they come one by one.
template <typename T>
void map_pages(T* data, int64_t count) {
#if defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kPage = 4096;
  const auto start = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const auto end = reinterpret_cast<uintptr_t>(data + count);
  if (data != nullptr) madvise(reinterpret_cast<void*>(start), end - start, MADV_POPULATE_WRITE);
#else
  (void)data, (void)count;
#endif
}

/// x seen as a matrix, cut into runs that share one scale, and each run into chunks.
struct Runs {
  QParamShape q;
  int64_t run, chunks_per_run, tasks;

  /// Calls f(offset of the chunk's first element, elements, index into scale) for task i.
  template <typename F>
  void visit(int64_t i, const F& f) const {
    const int64_t index = i / chunks_per_run, start = (i % chunks_per_run) * kChunk;
    f(index * run + start, std::min(kChunk, run - start), scale_index(i));
  }
  int64_t scale_index(int64_t task) const {
    const int64_t index = task / chunks_per_run;
    return q.rows == 1 ? index % q.groups : index;
  }
};

Runs check_fake_quantize(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t bits) {
  check_bits(op, bits);
  check_float(op, "x", x);
  check_same_device(op, "scale", scale, x);
  const int64_t rows = x.dim() >= 2 ? x.size(0) : 1;
  int64_t cols = x.dim() >= 2 ? 1 : x.numel();
  for (int64_t d = 1; d < x.dim(); ++d) cols *= x.size(d);
  Runs runs{};
  runs.q = check_qparams(op, scale, zero_point, rows, cols);
  const bool per_tensor = runs.q.rows == 1 && runs.q.groups == 1;
  runs.run = per_tensor ? rows * cols : runs.q.group_size;
  runs.chunks_per_run = std::max<int64_t>(1, (runs.run + kChunk - 1) / kChunk);
  runs.tasks = x.numel() == 0 ? 0 : x.numel() / runs.run * runs.chunks_per_run;
  return runs;
}

int64_t grain(const Runs& runs) { return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, runs.run)); }

/// All float32 and contiguous; residual and codes may be null.
void run_fake_quantize(const Runs& runs, const float* x, const Tensor& scale, const Tensor& zero_point, int64_t bits,
                       int64_t numel, bool given, float* out, float* residual, uint8_t* codes) {
  const Tensor s = as_contiguous(scale), z = as_contiguous(zero_point);
  const auto kernel = cpu::k_fake_quantize();
  const float* ps = data<float>(s);
  const int32_t* pz = data<int32_t>(z);
  const float top = static_cast<float>(max_code(static_cast<int>(bits)));
  const bool large = numel * (4 + (residual != nullptr ? 4 : 0) + (codes != nullptr ? 1 : 0)) >= kLargeBytes;
  parallel_for(runs.tasks, grain(runs), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      runs.visit(i, [&](int64_t at, int64_t n, int64_t si) {
        float* rest = residual != nullptr ? residual + at : nullptr;
        uint8_t* q = codes != nullptr ? codes + at : nullptr;
        if (large && !given) map_pages(out + at, n), map_pages(rest, n), map_pages(q, n);
        kernel(x + at, {ps[si], static_cast<float>(pz[si]), top}, n, large && given, out + at, rest, q);
      });
    std::atomic_thread_fence(std::memory_order_seq_cst);  // stores past the caches are not ordered by themselves
  });
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_cpu(Tensor x, Tensor scale, Tensor zero_point, int64_t bits,
                                                     bool want_residual, bool want_codes) {
  const char* op = "fake_quantize";
  const Runs runs = check_fake_quantize(op, x, scale, zero_point, bits);
  check_qparam_values(op, scale, zero_point);
  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> shape = sizes_of(x), none{0};
  const Tensor xf = as_contiguous(to_dtype(x, ScalarType::Float));
  Tensor out = empty(shape, ScalarType::Float);
  Tensor residual = empty(want_residual ? shape : none, ScalarType::Float);
  Tensor codes = empty(want_codes ? shape : none, ScalarType::Byte);
  run_fake_quantize(runs, data<float>(xf), scale, zero_point, bits, x.numel(), false, mutable_data<float>(out),
                    want_residual ? mutable_data<float>(residual) : nullptr,
                    want_codes ? mutable_data<uint8_t>(codes) : nullptr);
  return {to_dtype(out, dtype), to_dtype(residual, dtype), codes};
}

void fake_quantize_out_cpu(Tensor x, Tensor scale, Tensor zero_point, int64_t bits, Tensor out, OptTensor residual,
                           OptTensor codes) {
  const char* op = "fake_quantize_out";
  const Runs runs = check_fake_quantize(op, x, scale, zero_point, bits);
  check_qparam_values(op, scale, zero_point);
  check_dtype(op, "x", x, ScalarType::Float);
  const auto check_out = [&](const char* name, const Tensor& t, ScalarType dtype) {
    check_dtype(op, name, t, dtype);
    check_shape(op, name, t, sizes_of(x));
    CORA_CHECK(op, t.is_contiguous(), name, " must be contiguous, got shape ", shape_text(t), " in another layout");
  };
  check_out("out", out, ScalarType::Float);
  if (residual.has_value()) check_out("residual", *residual, ScalarType::Float);
  if (codes.has_value()) check_out("codes", *codes, ScalarType::Byte);
  const Tensor source = as_contiguous(x);
  run_fake_quantize(runs, data<float>(source), scale, zero_point, bits, x.numel(), true, mutable_data<float>(out),
                    residual.has_value() ? mutable_data<float>(*residual) : nullptr,
                    codes.has_value() ? mutable_data<uint8_t>(*codes) : nullptr);
}

std::tuple<Tensor, Tensor> fake_quantize_backward_cpu(Tensor grad, Tensor x, Tensor scale, Tensor zero_point,
                                                      int64_t bits) {
  const char* op = "fake_quantize_backward";
  const Runs runs = check_fake_quantize(op, x, scale, zero_point, bits);
  check_shape(op, "grad", grad, sizes_of(x));
  const ScalarType dtype = x.scalar_type();
  const Tensor xf = as_contiguous(to_dtype(x, ScalarType::Float));
  const Tensor gf = as_contiguous(to_dtype(grad, ScalarType::Float));
  const Tensor s = as_contiguous(scale), z = as_contiguous(zero_point);
  Tensor grad_x = empty(sizes_of(x), ScalarType::Float);
  Tensor grad_scale = empty(sizes_of(scale), ScalarType::Float);

  const auto kernel = cpu::k_fake_quantize_backward();
  const float* px = data<float>(xf);
  const float* pg = data<float>(gf);
  const float* ps = data<float>(s);
  const int32_t* pz = data<int32_t>(z);
  float* po = mutable_data<float>(grad_x);
  const float top = static_cast<float>(max_code(static_cast<int>(bits)));
  const bool large = 4 * x.numel() >= kLargeBytes;
  std::vector<double> partial(static_cast<size_t>(runs.tasks));  // summed in order: any thread count agrees
  parallel_for(runs.tasks, grain(runs), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      runs.visit(i, [&](int64_t at, int64_t count, int64_t si) {
        if (large) map_pages(po + at, count);
        partial[i] = kernel(pg + at, px + at, {ps[si], static_cast<float>(pz[si]), top}, count, po + at);
      });
  });
  std::vector<double> total(static_cast<size_t>(scale.numel()), 0.0);
  for (int64_t i = 0; i < runs.tasks; ++i) total[runs.scale_index(i)] += partial[i];
  std::copy(total.begin(), total.end(), mutable_data<float>(grad_scale));
  return {to_dtype(grad_x, dtype), grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cpu));
  m.impl("fake_quantize_out", TORCH_BOX(&fake_quantize_out_cpu));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cpu));
}

}  // namespace cora
