// cora::run_steps: a stretch of a fused network in one call. A layer takes a tenth of a millisecond; what Python and
// the dispatcher run between two of them takes half of that where a network's weights push their code out of the cache.
#include "ops/layer.h"
#include "ops/pooling.h"

#include <utility>

namespace cora {

namespace {

constexpr const char* kOp = "run_steps";

enum Kind : int64_t { kLayer, kMaxPool, kMean, kMeanPixels };

/// A row of `program`, int64, as cora/ops/steps.py writes it. Values are numbered: the inputs first, then each step's.
struct Step {
  int64_t kind;
  int64_t x, x_dies, add, add_dies;  // values; add is -1 for none; dies: nobody reads it afterwards
  int64_t layer;                     // index in `layers`
  int64_t x_given, x_zero_point, x_bits, x_halo, add_zero_point, add_halo, out_given, out_zero_point, out_halo;
  int64_t kernel_size[2], stride[2], padding[2], dilation[2], ceil_mode;  // of a pool
};
/// A row of `numbers`, float64.
struct Numbers {
  double x_scale, add_scale, low, high, out_scale;
};

/// The rows of a table of Row.
template <typename Row, typename T>
const Row* rows_as(const char* name, const Tensor& t, ScalarType dtype) {
  constexpr int64_t kColumns = sizeof(Row) / sizeof(T);
  check_dtype(kOp, name, t, dtype);
  CORA_CHECK(kOp, t.dim() == 2 && t.size(1) == kColumns && t.is_contiguous(), name, " must have shape [steps, ",
             kColumns, "], contiguous, got ", shape_text(t));
  return static_cast<const Row*>(t.const_data_ptr());
}

class Values {
 public:
  explicit Values(std::vector<Tensor> inputs) {
    for (Tensor& t : inputs) held_.emplace_back(std::move(t));
    given_ = size();
  }
  int64_t size() const { return static_cast<int64_t>(held_.size()); }
  /// Whether a value was made here, so that no one else holds it.
  bool own(int64_t index) const { return index >= given_; }
  const Tensor& at(int64_t index) const {
    CORA_CHECK(kOp, index >= 0 && index < size() && held_[static_cast<size_t>(index)].has_value(), "value ", index,
               " is not there");
    return *held_[static_cast<size_t>(index)];
  }
  void drop(int64_t index) { held_[static_cast<size_t>(index)].reset(); }
  void add(Tensor t) { held_.emplace_back(std::move(t)); }

 private:
  std::vector<OptTensor> held_;
  int64_t given_ = 0;
};

Tensor run_step(const Step& s, const Numbers& v, const std::vector<Tensor>& layers, const Values& values) {
  const Tensor& x = values.at(s.x);
  const auto pair = [](const int64_t (&p)[2]) { return std::vector<int64_t>{p[0], p[1]}; };
  if (s.kind == kMaxPool)
    return max_pool2d_codes(x, s.x_zero_point, s.x_halo, pair(s.kernel_size), pair(s.stride), pair(s.padding),
                            pair(s.dilation), s.ceil_mode != 0, s.out_halo);
  if (s.kind == kMean) return mean_codes(x, v.x_scale, s.x_zero_point, s.x_halo);
  if (s.kind == kMeanPixels) return mean_pixels(x);
  CORA_CHECK(kOp, s.kind == kLayer, "kind must be ", kLayer, "..", kMeanPixels, ", got ", s.kind);
  CORA_CHECK(kOp, s.layer >= 0 && s.layer < static_cast<int64_t>(layers.size()), "layer must be 0..",
             static_cast<int64_t>(layers.size()) - 1, ", got ", s.layer);
  RunArgs args{};
  args.op = "run_layer";
  args.x_bits = s.x_bits;
  if (s.x_given != 0) args.x_scale = v.x_scale;
  args.x_zero_point = s.x_zero_point;
  args.x_halo = s.x_halo;
  if (s.add >= 0) args.add = values.at(s.add);
  args.add_scale = v.add_scale;
  args.add_zero_point = s.add_zero_point;
  args.add_halo = s.add_halo;
  args.low = v.low;
  args.high = v.high;
  if (s.out_given != 0) args.out_scale = v.out_scale;
  args.out_zero_point = s.out_zero_point;
  args.out_halo = s.out_halo;
  args.in_place = s.add_dies != 0 && values.own(s.add) && s.add != s.x;
  return run_layer(x, view_layer(args.op, layers[static_cast<size_t>(s.layer)]), args);
}

std::vector<Tensor> run_steps_cpu(std::vector<Tensor> inputs, std::vector<Tensor> layers, Tensor program,
                                  Tensor numbers, std::vector<int64_t> outputs) {
  const Step* steps = rows_as<Step, int64_t>("program", program, ScalarType::Long);
  const Numbers* values_of = rows_as<Numbers, double>("numbers", numbers, ScalarType::Double);
  CORA_CHECK(kOp, numbers.size(0) == program.size(0), "numbers must have a row for each of the ", program.size(0),
             " steps, got ", numbers.size(0));
  Values values(std::move(inputs));
  for (int64_t i = 0; i < program.size(0); ++i) {
    const Step& s = steps[i];
    values.add(run_step(s, values_of[i], layers, values));
    if (s.x_dies != 0) values.drop(s.x);
    if (s.add >= 0 && s.add_dies != 0) values.drop(s.add);
  }
  std::vector<Tensor> results;
  for (const int64_t index : outputs) results.push_back(values.at(index));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CPU, m) { m.impl("run_steps", TORCH_BOX(&run_steps_cpu)); }

}  // namespace cora
