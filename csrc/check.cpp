#include "check.h"

#include "bits.h"

#include <cmath>
#include <cstdlib>
#include <utility>

namespace cora {

namespace {
constexpr int64_t kLongestK = 65536;  // 255 * 128 * 2^16 is the last sum of products that fits int32

std::string list_text(const int64_t* values, size_t count) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}

void check_pair(const char* op, const char* name, const std::vector<int64_t>& v, int64_t least) {
  CORA_CHECK(op, v.size() == 2, name, " must have 2 elements, got ", v.size());
  CORA_CHECK(op, v[0] >= least && v[1] >= least, name, " must be >= ", least, ", got ", list_text(v.data(), 2));
}

void check_float_or_codes(const char* op, const char* name, const Tensor& t) {
  CORA_CHECK(op, t.scalar_type() == ScalarType::Byte || is_float(t.scalar_type()), name,
             " must have dtype float32, float16, bfloat16 or uint8, got ", dtype_text(t.scalar_type()));
}

void check_x_bits(const char* op, int64_t x_bits) {
  CORA_CHECK(op, x_bits == 0 || (x_bits >= kMinBits && x_bits <= kMaxBits), "x_bits must be 0 or 2..8, got ", x_bits);
}
}  // namespace

std::string shape_text(const Tensor& t) { return list_text(t.sizes().data(), t.sizes().size()); }

std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  CORA_CHECK(op, t.scalar_type() == dtype, name, " must have dtype ", dtype_text(dtype), ", got ",
             dtype_text(t.scalar_type()));
}

void check_float(const char* op, const char* name, const Tensor& t) {
  CORA_CHECK(op, is_float(t.scalar_type()), name, " must have dtype float32, float16 or bfloat16, got ",
             dtype_text(t.scalar_type()));
}

void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  CORA_CHECK(op, sizes_of(t) == shape, name, " must have shape ", list_text(shape.data(), shape.size()), ", got ",
             shape_text(t));
}

void check_bits(const char* op, int64_t bits) {
  CORA_CHECK(op, bits >= kMinBits && bits <= kMaxBits, "bits must be 2..8, got ", bits);
}

void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  CORA_CHECK(op, t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name,
             " must be on the first argument's device");
}

QParamShape check_qparams(const char* op, const Tensor& scale, const Tensor& zero_point, int64_t rows, int64_t cols) {
  check_dtype(op, "scale", scale, ScalarType::Float);
  check_dtype(op, "zero_point", zero_point, ScalarType::Int);
  const bool two_d = scale.dim() == 2;
  const int64_t r = two_d ? scale.size(0) : 0;
  const int64_t g = two_d ? scale.size(1) : 0;
  const bool fits = two_d && (r == 1 || r == rows) && g >= 1 && cols % g == 0;
  if (!fits) {
    std::ostringstream first;
    if (rows == 1)
      first << 1;
    else
      first << "1 or " << rows;
    fail(op, "scale must have shape [", first.str(), ", G] with G a divisor of ", cols, ", got ", shape_text(scale));
  }
  check_shape(op, "zero_point", zero_point, {r, g});
  check_same_device(op, "zero_point", zero_point, scale);
  return {r, g, cols / g};
}

void check_scale(const char* op, const char* name, double scale) {
  const float value = static_cast<float>(scale);
  CORA_CHECK(op, std::isfinite(value) && value > 0, name, " must be finite and > 0, got ", scale);
}

void check_code(const char* op, const char* name, int64_t code, int64_t top) {
  CORA_CHECK(op, code >= 0 && code <= top, name, " must be 0..", top, ", got ", code);
}

void check_qparam_values(const char* op, const Tensor& scale, const Tensor& zero_point) {
  const Tensor s = as_contiguous(scale), z = as_contiguous(zero_point);
  for (int64_t i = 0; i < s.numel(); ++i) {
    const float value = data<float>(s)[i];
    CORA_CHECK(op, std::isfinite(value) && value > 0, "scale must be finite and > 0, got ", value, " at position ", i);
    const int64_t zp = data<int32_t>(z)[i];
    CORA_CHECK(op, std::llabs(zp) < (1 << 24), "zero_point must be within +-2^24, got ", zp, " at position ", i);
  }
}

QParamShape check_packed(const char* op, const char* name, const Tensor& packed, const Tensor& scale,
                         const Tensor& zero_point, int64_t bits, int64_t k) {
  check_bits(op, bits);
  check_dtype(op, name, packed, ScalarType::Byte);
  CORA_CHECK(op, packed.dim() == 2, name, " must have 2 dimensions, got shape ", shape_text(packed));
  CORA_CHECK(op, k >= 1, "k must be >= 1, got ", k);
  check_shape(op, name, packed, {packed.size(0), row_bytes(k, static_cast<int>(bits))});
  check_same_device(op, "scale", scale, packed);
  return check_qparams(op, scale, zero_point, packed.size(0), k);
}

void check_activation(const char* op, const char* name, const Tensor& t, double scale, int64_t zero_point, int64_t top,
                      int64_t halo) {
  check_scale(op, "scale", scale);
  check_code(op, "zero_point", zero_point, top);
  CORA_CHECK(op, halo >= 0, "halo must be >= 0, got ", halo);
  CORA_CHECK(op, halo == 0 || t.dim() == 4, name, " must have 4 dimensions for a halo, got shape ", shape_text(t));
}

bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t wanted[4] = {h * w * c, 1, w * c, c};
  for (int d = 0; d < 4; ++d)
    if (t.size(d) != 1 && t.stride(d) != wanted[d]) return false;
  return true;
}

bool prefers_channels_last(const Tensor& t) {
  if (!is_channels_last(t)) return false;
  return !t.is_contiguous() || (t.stride(1) == 1 && t.stride(3) == t.size(1) && t.stride(0) != 1);
}

std::vector<int64_t> packed_shape(const char* op, const Tensor& codes, int64_t bits) {
  check_bits(op, bits);
  check_dtype(op, "codes", codes, ScalarType::Byte);
  CORA_CHECK(op, codes.dim() >= 1, "codes must have at least 1 dimension, got shape []");
  std::vector<int64_t> shape = sizes_of(codes);
  shape.back() = row_bytes(shape.back(), static_cast<int>(bits));
  return shape;
}

std::vector<int64_t> unpacked_shape(const char* op, const Tensor& packed, int64_t bits, int64_t k) {
  check_bits(op, bits);
  check_dtype(op, "packed", packed, ScalarType::Byte);
  CORA_CHECK(op, k >= 0, "k must be >= 0, got ", k);
  CORA_CHECK(op, packed.dim() >= 1, "packed must have at least 1 dimension, got shape []");
  const int64_t bytes = row_bytes(k, static_cast<int>(bits));
  std::vector<int64_t> shape = sizes_of(packed);
  CORA_CHECK(op, shape.back() == bytes, "packed must have last dimension ", bytes, " for k = ", k, " and ", bits,
             " bits, got shape ", shape_text(packed));
  shape.back() = k;
  return shape;
}

// --- Layers -----------------------------------------------------------------------------------------

void check_window(const char* op, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
}

Window make_window(const char* op, bool linear, int64_t channels, const std::vector<int64_t>& kernel_size,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  Window window{};
  window.linear = linear;
  window.channels = channels;
  window.groups = groups;
  CORA_CHECK(op, channels >= 1, "channels must be >= 1, got ", channels);
  CORA_CHECK(op, groups >= 1 && channels % groups == 0, "groups must divide the ", channels, " channels, got ", groups);
  if (linear) return window;
  check_window(op, kernel_size, stride, padding, dilation);
  for (size_t d = 0; d < 2; ++d) {
    window.kernel[d] = kernel_size[d];
    window.stride[d] = stride[d];
    window.padding[d] = padding[d];
    window.dilation[d] = dilation[d];
  }
  return window;
}

int64_t channels_of(const char* op, const Tensor& x, bool linear) {
  CORA_CHECK(op, linear ? x.dim() >= 1 : x.dim() == 4, "x must have ", linear ? "at least 1 dimension" : "4 dimensions",
             ", got shape ", shape_text(x));
  return x.size(linear ? x.dim() - 1 : 1);
}

void check_operands(const char* name, const LayerArgs& v, const Window& window) {
  const char* op = v.op;
  const int64_t k = window.k(), groups = window.groups;
  check_packed(op, name, v.weight, v.scale, v.zero_point, v.bits, k);
  const int64_t n = v.weight.size(0);
  CORA_CHECK(op, n % groups == 0, "groups must divide the ", n, " rows of ", name, ", got ", groups);
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
    check_same_device(op, "a", *v.a, v.weight);
    check_same_device(op, "b", *v.b, v.weight);
    if (type == ScalarType::Char) {
      CORA_CHECK(op, v.adapter_scale.has_value(), "adapter_scale must be given with an int8 adapter");
      check_dtype(op, "adapter_scale", *v.adapter_scale, ScalarType::Float);
      check_shape(op, "adapter_scale", *v.adapter_scale, {groups * rank});
      check_same_device(op, "adapter_scale", *v.adapter_scale, v.weight);
    } else {
      CORA_CHECK(op, !v.adapter_scale.has_value(), "adapter_scale must be None with a float adapter");
    }
  } else {
    CORA_CHECK(op, !v.adapter_scale.has_value(), "adapter_scale must be None without an adapter");
  }
  if (v.bias.has_value()) {
    check_dtype(op, "bias", *v.bias, ScalarType::Float);
    check_shape(op, "bias", *v.bias, {n});
    check_same_device(op, "bias", *v.bias, v.weight);
  }
}

void check_input(const char* op, const Tensor& x, const OptTensor& x_scale, const OptTensor& x_zero_point,
                 int64_t x_bits) {
  check_float(op, "x", x);
  check_x_bits(op, x_bits);
  CORA_CHECK(op, x_scale.has_value() == x_zero_point.has_value(), "x_scale and x_zero_point must be given together");
  if (!x_scale.has_value()) return;
  CORA_CHECK(op, x_bits > 0, "x_scale must be None when x_bits is 0");
  check_dtype(op, "x_scale", *x_scale, ScalarType::Float);
  check_dtype(op, "x_zero_point", *x_zero_point, ScalarType::Int);
  for (const auto& [name, t] : {std::pair{"x_scale", &*x_scale}, std::pair{"x_zero_point", &*x_zero_point}}) {
    CORA_CHECK(op, t->numel() == 1, name, " must have 1 element, got shape ", shape_text(*t));
    check_same_device(op, name, *t, x);
  }
}

Window check_run(const Tensor& x, Window w, int64_t n, const RunArgs& v) {
  const char* op = v.op;
  const bool codes = x.scalar_type() == ScalarType::Byte;
  check_float_or_codes(op, "x", x);
  check_x_bits(op, v.x_bits);
  CORA_CHECK(op, !codes || (v.x_bits > 0 && v.x_scale.has_value()), "x_scale and x_bits must be given with codes");
  for (const auto& [name, halo] :
       {std::pair{"x_halo", v.x_halo}, std::pair{"add_halo", v.add_halo}, std::pair{"out_halo", v.out_halo}}) {
    CORA_CHECK(op, halo >= 0, name, " must be >= 0, got ", halo);
    CORA_CHECK(op, !w.linear || halo == 0, name, " must be 0 for a linear layer, got ", halo);
  }
  CORA_CHECK(op, codes || v.x_halo == 0, "x_halo must be 0 unless x holds codes, got ", v.x_halo);
  CORA_CHECK(op, v.out_scale.has_value() || v.out_halo == 0, "out_halo must be 0 for a float output, got ", v.out_halo);
  if (v.x_scale.has_value()) {
    CORA_CHECK(op, v.x_bits > 0, "x_scale must be None when x_bits is 0");
    check_scale(op, "x_scale", *v.x_scale);
    check_code(op, "x_zero_point", v.x_zero_point, max_code(static_cast<int>(v.x_bits)));
  }
  CORA_CHECK(op, v.low <= v.high, "clamp_min must be <= clamp_max, got ", v.low, " and ", v.high);
  if (v.out_scale.has_value()) {
    check_scale(op, "out_scale", *v.out_scale);
    check_code(op, "out_zero_point", v.out_zero_point, 255);
  }
  CORA_CHECK(op, channels_of(op, x, w.linear) == w.channels, "x must have ", w.channels, " channels along dimension ",
             w.linear ? x.dim() - 1 : 1, ", got shape ", shape_text(x));
  CORA_CHECK(op, v.x_bits == 0 || w.k() <= kLongestK, "k must be <= ", kLongestK, " with quantised input, got ", w.k());
  w.batch = w.linear ? x.numel() / w.channels : x.size(0);
  for (int d = 0; d < 2; ++d) {
    w.size[d] = w.linear ? 1 : x.size(2 + d) - 2 * v.x_halo;
    CORA_CHECK(op, w.size[d] >= 0, "x_halo must be at most half of x's height and width, got ", v.x_halo);
    CORA_CHECK(op, w.padded(d) >= w.reach(d), "x's padded height and width must be at least ", w.reach(d),
               " along dimension ", 2 + d, ", got ", w.padded(d));
  }
  if (v.add.has_value()) {
    check_float_or_codes(op, "add", *v.add);
    check_shape(op, "add", *v.add, output_shape(x, w, n, v.add_halo));
    check_same_device(op, "add", *v.add, x);
  }
  return w;
}

std::vector<int64_t> output_shape(const Tensor& x, const Window& w, int64_t n, int64_t halo) {
  if (!w.linear) return {w.batch, n, w.out(0) + 2 * halo, w.out(1) + 2 * halo};
  std::vector<int64_t> shape = sizes_of(x);
  shape.back() = n;
  return shape;
}

}  // namespace cora
