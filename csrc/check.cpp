#include "check.h"

#include "bits.h"

#include <cmath>
#include <cstdlib>

namespace cora {

namespace {
std::string list_text(const int64_t* values, size_t count) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
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

bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t wanted[4] = {h * w * c, 1, w * c, c};
  for (int d = 0; d < 4; ++d)
    if (t.size(d) != 1 && t.stride(d) != wanted[d]) return false;
  return true;
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

}  // namespace cora
