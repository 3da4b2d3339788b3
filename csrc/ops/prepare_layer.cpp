// cora::prepare_layer: the packed layout -> a prepared layer.
#include "ops/layer.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cora {

namespace {

using cpu::kLanes;
using cpu::kQuad;
using cpu::kQuadRow;

constexpr uint64_t kMagic = 0x31726579616c6163;  // "calayer1"

void plan_walk(LayerHeader& h, int64_t scale_groups) {
  const int64_t taps = h.kernel[0] * h.kernel[1], cg = h.channels / h.groups;
  h.segments = scale_groups;
  if (scale_groups > 1 && taps * cg / scale_groups % taps != 0) {
    h.walk = Walk::kNatural;
    h.taps = 1;
    h.run = taps * cg;
  } else if (scale_groups == 1 && h.groups == 1 && h.dilation[1] == 1 && h.kernel[1] > 1) {
    h.walk = Walk::kLines;
    h.taps = h.kernel[0];
    h.run = h.kernel[1] * cg;
    constexpr int64_t kStep = 64;  // of K, on the level with the longest
    if (h.taps * round_up(h.run, kStep) >= 2 * round_up(h.taps * h.run, kStep)) {
      h.walk = Walk::kColumns;
      h.run *= h.taps;
      h.taps = 1;
    }
  } else {
    h.walk = Walk::kTaps;
    h.taps = taps;
    h.run = cg;
  }
}

/// Natural index (channel, ky, kx) of element k of run t.
int64_t natural_index(const LayerHeader& h, int64_t t, int64_t k) {
  if (h.walk == Walk::kNatural) return k;
  const int64_t taps = h.kernel[0] * h.kernel[1], cg = h.channels / h.groups;
  if (h.walk == Walk::kTaps) return k * taps + t;
  if (h.walk == Walk::kColumns) {
    const int64_t column = k / (h.kernel[0] * cg), row = k / cg % h.kernel[0];
    return (k % cg * h.kernel[0] + row) * h.kernel[1] + column;
  }
  return (k % cg * h.kernel[0] + t) * h.kernel[1] + k / cg;
}

/// Lays the arrays out behind the header.
void plan_arrays(LayerHeader& h) {
  const int64_t lanes = h.groups * h.panels * kLanes, grouped = lanes * h.segments;
  Arrays arrays;
  const Layer view{&h};
  h.codes = arrays.take(h.groups * h.panels * h.segments * view.segment_bytes() + kSlack);
  h.offset = arrays.take(grouped);
  h.scale = arrays.take(grouped * 4);
  h.zero_point = arrays.take(grouped * 4);
  h.wsum = arrays.take(grouped * 4);
  h.far_zero = arrays.take(h.far ? grouped * 4 : 0);
  h.bias = arrays.take(h.has_bias ? lanes * 4 : 0);
  const int64_t chunks = h.groups * h.chunks;
  h.a = arrays.take(chunks * (h.rank > 0 ? view.a_size() : 0) + kSlack);
  h.a_scale = arrays.take(chunks * kLanes * 4);
  h.a_sum = arrays.take(chunks * kLanes * 4);
  h.b = arrays.take(lanes * h.rank * (h.adapter == AdapterKind::kInt8 ? 1 : 4));
  h.bytes = arrays.end();
}

/// The part of a zero-point that an int8 weight can carry: code - offset fits for every code.
int32_t weight_offset(int32_t zero_point, int bits) {
  const int top = max_code(bits);
  return std::clamp(zero_point, std::max(0, top - 127), std::min(top, 128));
}

template <typename T>
T* mutable_at(uint8_t* blob, int64_t offset) {
  return reinterpret_cast<T*>(blob + offset);
}

void fill_panel(const LayerHeader& h, const LayerSource& source, int64_t p, uint8_t* blob) {
  const Layer view{&h};
  const int64_t g = p / h.panels, first = p % h.panels * kLanes, run = view.segment_run(), k = h.taps * h.run;
  const int64_t lanes = std::min<int64_t>(kLanes, view.group_n() - first), row0 = g * view.group_n() + first;
  std::vector<uint8_t> codes(static_cast<size_t>(lanes * k));
  for (int64_t lane = 0; lane < lanes; ++lane)
    cpu::k_unpack_row()(source.packed + (row0 + lane) * source.row_stride, k, h.bits, codes.data() + lane * k);
  for (int64_t s = 0; s < h.segments; ++s) {
    const int64_t at = (p * h.segments + s) * kLanes;
    uint8_t* offset = mutable_at<uint8_t>(blob, h.offset) + at;
    float* scale = mutable_at<float>(blob, h.scale) + at;
    int32_t* zero = mutable_at<int32_t>(blob, h.zero_point) + at;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t from = source.first_scale(row0 + lane) + s;
      scale[lane] = lane < lanes ? source.scale[from] : 0.0f;
      zero[lane] = lane < lanes ? source.zero_point[from] : 0;
      offset[lane] = static_cast<uint8_t>(weight_offset(zero[lane], h.bits));
      if (h.far) mutable_at<int32_t>(blob, h.far_zero)[at + lane] = zero[lane] - offset[lane];
    }
    int32_t* wsum = mutable_at<int32_t>(blob, h.wsum) + at;
    std::fill_n(wsum, kLanes, 0);
    uint8_t* out = blob + h.codes + (p * h.segments + s) * view.segment_bytes();
    for (int64_t t = 0; t < h.taps; ++t)
      for (int64_t quad = 0; quad < view.quads(); ++quad, out += cpu::quad_row_bytes(h.bits)) {
        uint8_t row[kQuadRow];
        for (int64_t lane = 0; lane < kLanes; ++lane)
          for (int64_t j = 0; j < kQuad; ++j) {
            const int64_t at_run = quad * kQuad + j;
            // What does not exist is stored as its offset, weight 0.
            const bool exists = lane < lanes && at_run < run;
            const uint8_t code = exists ? codes[lane * k + natural_index(h, t, s * run + at_run)] : offset[lane];
            row[lane * kQuad + j] = code;
            wsum[lane] += code - offset[lane];
            if (h.ready) row[lane * kQuad + j] = static_cast<uint8_t>(code - 128);
          }
        cpu::pack_quad_row(row, h.bits, out);
      }
  }
  if (h.has_bias) {
    float* bias = mutable_at<float>(blob, h.bias) + p * kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) bias[lane] = lane < lanes ? source.bias[row0 + lane] : 0.0f;
  }
  for (int64_t j = 0; j < h.rank; ++j)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t to = (p * h.rank + j) * kLanes + lane, from = (row0 + lane) * h.rank + j;
      if (h.adapter == AdapterKind::kInt8)
        mutable_at<int8_t>(blob, h.b)[to] = lane < lanes ? source.b_codes[from] : 0;
      else
        mutable_at<float>(blob, h.b)[to] = lane < lanes ? source.b_float[from] : 0.0f;
    }
}

void fill_chunk(const LayerHeader& h, const LayerSource& source, int64_t q, uint8_t* blob) {
  const Layer view{&h};
  const int64_t first = q % h.chunks * kLanes, row0 = q / h.chunks * h.rank + first, k = h.taps * h.run;
  const int64_t lanes = std::min<int64_t>(kLanes, h.rank - first);
  float* scale = mutable_at<float>(blob, h.a_scale) + q * kLanes;
  int32_t* sum = mutable_at<int32_t>(blob, h.a_sum) + q * kLanes;
  std::fill_n(sum, kLanes, 0);
  for (int64_t lane = 0; lane < kLanes; ++lane)
    scale[lane] = lane >= lanes ? 0.0f : h.adapter == AdapterKind::kInt8 ? source.a_scale[row0 + lane] : 1.0f;
  const int64_t runs = h.adapter == AdapterKind::kInt8 ? view.a_quads() * kQuad : h.run;
  for (int64_t t = 0; t < h.taps; ++t)
    for (int64_t e = 0; e < runs; ++e)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool exists = lane < lanes && e < h.run;
        const int64_t from = exists ? (row0 + lane) * k + natural_index(h, t, e) : 0;
        if (h.adapter == AdapterKind::kInt8) {
          const int8_t value = exists ? source.a_codes[from] : int8_t{0};
          const int64_t to = ((t * runs + e) / kQuad * kLanes + lane) * kQuad + e % kQuad;
          mutable_at<uint8_t>(blob, h.a + q * view.a_size())[to] =
              static_cast<uint8_t>(h.a_ready ? value : value + 128);
          sum[lane] += value;
        } else {
          mutable_at<float>(blob, h.a + q * view.a_size())[(t * runs + e) * kLanes + lane] =
              exists ? source.a_float[from] : 0.0f;
        }
      }
}

/// Whether every weight's offset is 128.
bool has_middle_offsets(const LayerSource& source, int bits) {
  const int32_t* end = source.zero_point + source.q.rows * source.q.groups;
  return std::all_of(source.zero_point, end, [&](int32_t zero) { return weight_offset(zero, bits) == 128; });
}

/// The largest |code - zero_point|.
int64_t widest_weight(const LayerSource& source, int bits) {
  int64_t widest = 0;
  const int64_t top = max_code(bits);
  for (int64_t i = 0; i < source.q.rows * source.q.groups; ++i) {
    const int64_t zero = source.zero_point[i];
    widest = std::max({widest, std::abs(zero), std::abs(top - zero)});
  }
  return widest;
}

/// The largest code of A, at least 1.
int32_t widest_a(const int8_t* codes, int64_t count) {
  int widest = 1;
  for (int64_t i = 0; i < count; ++i) widest = std::max(widest, std::abs(int{codes[i]}));
  return widest;
}

/// Asks for large pages before the memory is first touched: plain reads past the caches run a third faster
/// on them.
void advise_large_pages([[maybe_unused]] uint8_t* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a wish
#endif
}

}  // namespace

Layer view_layer(const char* op, const Tensor& blob) {
  const LayerHeader* h = blob.scalar_type() == ScalarType::Byte && blob.dim() == 1 && blob.is_contiguous() &&
                                 blob.numel() >= static_cast<int64_t>(sizeof(LayerHeader))
                             ? reinterpret_cast<const LayerHeader*>(data<uint8_t>(blob))
                             : nullptr;
  CORA_CHECK(op, h != nullptr && h->magic == kMagic && h->bytes == blob.numel(),
             "layer must be a tensor that prepare_layer returned on this kind of device, got shape ", shape_text(blob),
             ", dtype ", dtype_text(blob.scalar_type()));
  return {h};
}

Tensor prepare_layer(const LayerArgs& args, const Window& window) {
  const Tensor packed = as_contiguous(args.weight), scale = as_contiguous(args.scale);
  const Tensor zero_point = as_contiguous(args.zero_point);
  const auto dense = [](const OptTensor& t, ScalarType dtype) {
    return t.has_value() ? OptTensor(as_contiguous(to_dtype(*t, dtype))) : OptTensor();
  };
  const bool rank = args.b.has_value() && args.b->size(1) > 0;
  const bool int8 = rank && args.a->scalar_type() == ScalarType::Char;
  const ScalarType kind = int8 ? ScalarType::Char : ScalarType::Float;
  const OptTensor a = rank ? dense(args.a, kind) : OptTensor(), b = rank ? dense(args.b, kind) : OptTensor();
  const OptTensor a_scale = dense(args.adapter_scale, ScalarType::Float), bias = dense(args.bias, ScalarType::Float);

  LayerHeader h{};
  h.magic = kMagic;
  h.linear = window.linear;
  h.n = packed.size(0);
  h.channels = window.channels;
  h.groups = window.groups;
  for (int d = 0; d < 2; ++d) {
    h.kernel[d] = window.kernel[d];
    h.stride[d] = window.stride[d];
    h.padding[d] = window.padding[d];
    h.dilation[d] = window.dilation[d];
  }
  h.bits = static_cast<int32_t>(args.bits);
  plan_walk(h, scale.size(1));
  h.rank = rank ? args.b->size(1) : 0;
  h.adapter = !rank ? AdapterKind::kNone : int8 ? AdapterKind::kInt8 : AdapterKind::kFloat;
  h.panels = (h.n / h.groups + kLanes - 1) / kLanes;
  h.chunks = (h.rank + kLanes - 1) / kLanes;
  h.has_bias = bias.has_value();
  h.depthwise = h.groups > 1 && h.channels == h.groups && h.n == h.groups && h.rank <= 1;

  LayerSource source{};
  source.packed = data<uint8_t>(packed);
  source.scale = data<float>(scale);
  source.zero_point = data<int32_t>(zero_point);
  source.row_stride = packed.size(1);
  source.q = {scale.size(0), scale.size(1), window.k() / scale.size(1)};
  if (bias) source.bias = data<float>(*bias);
  if (int8) {
    source.a_codes = data<int8_t>(*a);
    source.b_codes = data<int8_t>(*b);
    source.a_scale = data<float>(*a_scale);
  } else if (rank) {
    source.a_float = data<float>(*a);
    source.b_float = data<float>(*b);
  }
  for (int64_t i = 0; i < source.q.rows * source.q.groups; ++i)
    h.far = h.far || weight_offset(source.zero_point[i], h.bits) != source.zero_point[i];
  const int64_t widest = widest_weight(source, h.bits);
  h.narrow = widest * 255 * source.q.group_size <= INT32_MAX;
  h.bf16 = widest <= cpu::kExactBf16;
  // Few rows of a linear layer are multiplied by codes as they are.
  h.ready = !h.linear && !h.depthwise && h.bits == 8 && has_middle_offsets(source, h.bits);
  h.a_ready = !h.linear && int8;
  h.a_widest = int8 ? widest_a(source.a_codes, a->numel()) : 0;
  h.depthwise ? plan_depthwise(h, source) : plan_arrays(h);

  Tensor blob = empty({h.bytes}, ScalarType::Byte);
  uint8_t* out = mutable_data<uint8_t>(blob);
  advise_large_pages(out, h.bytes);
  std::memset(out, 0, static_cast<size_t>(h.bytes));
  std::memcpy(out, &h, sizeof h);
  if (h.depthwise) {
    fill_depthwise(h, source, out);
    return blob;
  }
  parallel_for(h.groups * h.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) fill_panel(h, source, p, out);
  });
  parallel_for(h.groups * h.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) fill_chunk(h, source, q, out);
  });
  return blob;
}

}  // namespace cora
