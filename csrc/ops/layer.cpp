// Checks and the order of the passes.
#include "ops/layer.h"

#include <cmath>

namespace cora {

namespace {

bool is_float(ScalarType t) { return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16; }

template <typename T>
void run_as(const LayerArgs& args, const LayerWeights& weights, const Window& window, bool nchw, float* y) {
  const LayerInput<T> input = prepare_input<T>(args, window, nchw);
  const bool depthwise =
      window.groups > 1 && window.group_channels() == 1 && weights.n == window.groups && weights.rank <= 1;
  (depthwise ? run_depthwise<T> : run_tiles<T>)(weights, window, input, y);
}

}  // namespace

void check_layer(const LayerArgs& v, int64_t n, int64_t k, int64_t groups) {
  const char* op = v.op;
  CORA_CHECK(op, is_float(v.x.scalar_type()), "x must have dtype float32, float16 or bfloat16, got ",
             dtype_text(v.x.scalar_type()));
  CORA_CHECK(op, v.a.has_value() == v.b.has_value(), "a and b must be given together");
  if (v.a.has_value()) {
    const ScalarType type = v.a->scalar_type();
    CORA_CHECK(op, type == ScalarType::Char || is_float(type),
               "a must have dtype int8, float16, bfloat16 or float32, got ", dtype_text(type));
    check_dtype(op, "b", *v.b, type);
    CORA_CHECK(op, v.b->dim() == 2, "b must have 2 dimensions, got shape ", shape_text(*v.b));
    const int64_t rank = v.b->size(1);
    check_shape(op, "b", *v.b, {n, rank});
    check_shape(op, "a", *v.a, {groups * rank, k});
    if (type == ScalarType::Char) {
      CORA_CHECK(op, v.adapter_scale.has_value(), "adapter_scale must be given with an int8 adapter");
      check_dtype(op, "adapter_scale", *v.adapter_scale, ScalarType::Float);
      check_shape(op, "adapter_scale", *v.adapter_scale, {groups * rank});
    } else {
      CORA_CHECK(op, !v.adapter_scale.has_value(), "adapter_scale must be None with a float adapter");
    }
  } else {
    CORA_CHECK(op, !v.adapter_scale.has_value(), "adapter_scale must be None without an adapter");
  }
  if (v.bias.has_value()) {
    check_dtype(op, "bias", *v.bias, ScalarType::Float);
    check_shape(op, "bias", *v.bias, {n});
  }
  CORA_CHECK(op, v.x_bits == 0 || (v.x_bits >= kMinBits && v.x_bits <= kMaxBits), "x_bits must be 0 or 2..8, got ",
             v.x_bits);
  CORA_CHECK(op, v.x_scale.has_value() == v.x_zero_point.has_value(),
             "x_scale and x_zero_point must be given together");
  if (v.x_scale.has_value()) {
    CORA_CHECK(op, v.x_bits > 0, "x_scale must be None when x_bits is 0");
    check_dtype(op, "x_scale", *v.x_scale, ScalarType::Float);
    check_dtype(op, "x_zero_point", *v.x_zero_point, ScalarType::Int);
    CORA_CHECK(op, v.x_scale->numel() == 1, "x_scale must have 1 element, got shape ", shape_text(*v.x_scale));
    CORA_CHECK(op, v.x_zero_point->numel() == 1, "x_zero_point must have 1 element, got shape ",
               shape_text(*v.x_zero_point));
    const float scale = *data<float>(*v.x_scale);
    const int32_t zero = *data<int32_t>(*v.x_zero_point);
    CORA_CHECK(op, std::isfinite(scale) && scale > 0, "x_scale must be finite and > 0, got ", scale);
    const int top = max_code(static_cast<int>(v.x_bits));
    CORA_CHECK(op, zero >= 0 && zero <= top, "x_zero_point must be 0..", top, ", got ", zero);
  }
  // 255 * 128 * 2^16 is the last product sum that fits the int32 accumulators.
  CORA_CHECK(op, v.x_bits == 0 || k <= 65536, "k must be <= 65536 with quantised input, got ", k);
}

bool fits_int32(const LayerWeights& w, int64_t count) {
  int64_t widest = 0;
  const int64_t top = max_code(w.bits);
  for (int64_t i = 0; i < w.q.rows * w.q.groups; ++i) {
    const int64_t zero = w.zero_point[i];
    widest = std::max({widest, std::abs(zero), std::abs(top - zero)});
  }
  return widest * 255 * count <= INT32_MAX;
}

void run_layer(const LayerArgs& args, const Window& window, bool nchw, float* y) {
  if (window.rows() == 0 || args.weight.size(0) == 0) return;
  const Tensor packed = as_contiguous(args.weight), scale = as_contiguous(args.scale);
  const Tensor zero_point = as_contiguous(args.zero_point);
  const auto dense = [](const OptTensor& t, ScalarType dtype) {
    return t.has_value() ? OptTensor(as_contiguous(to_dtype(*t, dtype))) : OptTensor();
  };
  const bool rank = args.b.has_value() && args.b->size(1) > 0;
  const bool int8 = rank && args.a->scalar_type() == ScalarType::Char;
  const OptTensor a = rank ? dense(args.a, int8 ? ScalarType::Char : ScalarType::Float) : OptTensor();
  const OptTensor b = rank ? dense(args.b, ScalarType::Float) : OptTensor();
  const OptTensor a_scale = dense(args.adapter_scale, ScalarType::Float), bias = dense(args.bias, ScalarType::Float);

  LayerWeights w{};
  w.packed = data<uint8_t>(packed);
  w.scale = data<float>(scale);
  w.zero_point = data<int32_t>(zero_point);
  w.bias = bias ? data<float>(*bias) : nullptr;
  w.a_codes = int8 ? data<int8_t>(*a) : nullptr;
  w.a_float = rank && !int8 ? data<float>(*a) : nullptr;
  w.a_scale = int8 ? data<float>(*a_scale) : nullptr;
  w.b = rank ? data<float>(*b) : nullptr;
  w.n = packed.size(0);
  w.k = window.k();
  w.rank = rank ? args.b->size(1) : 0;
  w.row_stride = packed.size(1);
  w.bits = static_cast<int>(args.bits);
  w.q = {scale.size(0), scale.size(1), w.k / scale.size(1)};
  (args.x_bits > 0 ? run_as<int8_t> : run_as<float>)(args, w, window, nchw, y);
}

}  // namespace cora
