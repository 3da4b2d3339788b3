// Depthwise layers: each channel its own filter. Channels lie together in memory, so the vector runs
// over channels, in blocks of 32; a block of a row of the output is made at once.
//
// A prepared depthwise layer holds, p counting blocks and every array padded to 32 channels:
//   codes   int8 filters [p][segments (+ segments)][planes][kx][quad of ky][32][4]; the second half, there
//           when a zero-point is far, has weight 1 wherever the segment has a tap
//   scale, wsum, far_zero   [p][segments][32]
//   bias    [p][32]
//   a       the adapter, of rank 0 or 1 (all a group of one row can use): an int8 filter, or floats [p][ky][kx][32]
//   a_sum, b [p][32]; b is a_scale * b
//   merged  float weights [p][ky][kx][32] with the adapter added: what float activations meet
// A weight code - zero_point has up to nine bits; where one has, it is the sum of two int8 planes.
#include "ops/layer.h"

#include <cmath>
#include <type_traits>

namespace cora {

namespace {

using cpu::kLanes;
using cpu::kQuad;
using cpu::kQuadRow;

// Positions at a time, and rows of them below one another: what a row's neighbours share stays in L1.
constexpr int64_t kSpan = 28, kBand = 8;
constexpr int64_t kTasks = 64;       // bands are lower rather than there being fewer tasks
constexpr int64_t kFarTaps = 32768;  // so many taps of nine-bit weights by eight-bit codes fit int32

int64_t blocks_of(const LayerHeader& h) { return ceil_div(h.channels, kLanes); }
int64_t filter_bytes(const LayerHeader& h) { return h.kernel[1] * ((h.kernel[0] + kQuad - 1) / kQuad) * kQuadRow; }
/// Integer filters of a block.
int64_t sets_bytes(const LayerHeader& h) { return h.segments * (h.planes + (h.far ? 1 : 0)) * filter_bytes(h); }
int64_t a_bytes(const LayerHeader& h) {
  return h.adapter == AdapterKind::kInt8 ? filter_bytes(h) : h.taps * kLanes * int64_t{sizeof(float)};
}

template <typename T>
T* array(uint8_t* blob, int64_t offset, int64_t index) {
  return reinterpret_cast<T*>(blob + offset) + index;
}

/// Where tap t of a lane is in a filter.
int64_t filter_index(const LayerHeader& h, int64_t t, int64_t lane) {
  const int64_t ky = t / h.kernel[1], kx = t % h.kernel[1], quads = (h.kernel[0] + kQuad - 1) / kQuad;
  return ((kx * quads + ky / kQuad) * kLanes + lane) * kQuad + ky % kQuad;
}

}  // namespace

void plan_depthwise(LayerHeader& h, const LayerSource& source) {
  h.walk = Walk::kTaps;
  h.taps = h.kernel[0] * h.kernel[1];
  h.run = 1;
  int64_t low = 0, high = 0;  // weights, and the adapter's
  for (int64_t i = 0; i < source.q.rows * source.q.groups; ++i) {
    low = std::min<int64_t>(low, -source.zero_point[i]);
    high = std::max<int64_t>(high, max_code(h.bits) - source.zero_point[i]);
  }
  h.far = low < -256 || high > 254 || h.taps > kFarTaps;
  h.planes = !h.far && (low < -128 || high > 127) ? 2 : 1;
  Arrays arrays;
  const int64_t blocks = blocks_of(h), lanes = blocks * kLanes * 4;
  h.codes = arrays.take(blocks * sets_bytes(h));
  h.scale = arrays.take(h.segments * lanes);
  h.wsum = arrays.take(h.segments * lanes);
  h.far_zero = arrays.take(h.far ? h.segments * lanes : 0);
  h.bias = arrays.take(h.has_bias ? lanes : 0);
  h.a = arrays.take(h.rank * blocks * a_bytes(h));
  h.a_sum = arrays.take(h.rank * lanes);
  h.b = arrays.take(h.rank * lanes);
  h.merged = arrays.take(h.taps * lanes);
  h.bytes = arrays.end();
}

void fill_depthwise(const LayerHeader& h, const LayerSource& source, uint8_t* blob) {
  const int64_t taps = h.taps, segment_taps = taps / h.segments;
  const bool int8 = h.adapter == AdapterKind::kInt8;
  std::vector<uint8_t> codes(static_cast<size_t>(taps));
  for (int64_t n = 0; n < h.channels; ++n) {
    const int64_t p = n / kLanes, lane = n % kLanes;
    cpu::k_unpack_row()(source.packed + n * source.row_stride, taps, h.bits, codes.data());
    if (h.has_bias) *array<float>(blob, h.bias, n) = source.bias[n];
    float b = 0;
    if (h.rank > 0) {
      b = int8 ? source.a_scale[n] * static_cast<float>(source.b_codes[n]) : source.b_float[n];
      *array<float>(blob, h.b, n) = b;
    }
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t s = t / segment_taps, at = (p * h.segments + s) * kLanes + lane;
      const float scale = source.scale[source.first_scale(n) + s];
      const int32_t zero = source.zero_point[source.first_scale(n) + s];
      const int32_t offset = !h.far ? zero : h.bits == 8 ? 128 : 0;
      *array<float>(blob, h.scale, at) = scale;
      if (h.far) *array<int32_t>(blob, h.far_zero, at) = zero - offset;

      const int32_t weight = codes[t] - offset;
      *array<int32_t>(blob, h.wsum, at) += weight;
      uint8_t* sets = blob + h.codes + p * sets_bytes(h) + filter_index(h, t, lane);
      uint8_t* filter = sets + s * h.planes * filter_bytes(h);
      const int32_t first = h.planes == 2 ? weight >> 1 : weight;
      *filter = static_cast<uint8_t>(first);
      if (h.planes == 2) filter[filter_bytes(h)] = static_cast<uint8_t>(weight - first);
      if (h.far) sets[(h.segments * h.planes + s) * filter_bytes(h)] = 1;

      float merged = scale * static_cast<float>(codes[t] - zero);
      if (h.rank > 0 && int8) {
        const int8_t a = source.a_codes[n * taps + t];
        blob[h.a + p * a_bytes(h) + filter_index(h, t, lane)] = static_cast<uint8_t>(a);
        *array<int32_t>(blob, h.a_sum, n) += a;
        merged = std::fma(b, static_cast<float>(a), merged);
      } else if (h.rank > 0) {
        const float a = source.a_float[n * taps + t];
        *array<float>(blob, h.a, (p * taps + t) * kLanes + lane) = a;
        merged = std::fma(b, a, merged);
      }
      *array<float>(blob, h.merged, (p * taps + t) * kLanes + lane) = merged;
    }
  }
}

namespace {

template <typename X>
class Depthwise {
 public:
  Depthwise(const Layer& layer, const Window& win, const LayerInput<X>& in, const LayerOutput& out)
      : layer_(layer), h_(*layer.h), win_(win), in_(in), out_(out), isa_(cpu::active_isa()) {
    shape_ = {h_.kernel[0], h_.kernel[1], h_.dilation[0] * in.line, in.pixel, h_.stride[1], h_.dilation[1]};
    const int64_t span = std::min(kSpan, win.out(1));
    at_.resize(static_cast<size_t>(span));
    add_at_.resize(static_cast<size_t>(span));
    for (size_t i = 0; i < at_.size(); ++i) {
      at_[i] = static_cast<int64_t>(i) * out.pixel;
      add_at_[i] = static_cast<int64_t>(i) * out.add_pixel;
    }
    for (int d = 0; d < 2; ++d) inside_[d] = inside(d);
    if constexpr (kInt) {
      fold_scales();
      const cpu::Epilogue& e = out.epilogue;
      if (direct() && e.codes && e.add == nullptr && h_.adapter != AdapterKind::kFloat)
        fused_ = cpu::k_depthwise_codes.at(isa_);
    }
  }

  void run() const {
    const int64_t height = win_.out(0), width = win_.out(1), blocks = blocks_of(h_);
    const int64_t spans = (width + kSpan - 1) / kSpan, columns = win_.batch * spans * blocks;
    const int64_t band = std::clamp<int64_t>(height * columns / kTasks, 1, std::min(kBand, height));
    const int64_t bands = (height + band - 1) / band;
    const int64_t work = band * std::min(kSpan, width) * h_.taps * kLanes;
    parallel_for(columns * bands, std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) {
      Scratch s(*this);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t line = i / blocks / spans, x = i / blocks % spans * kSpan, y = line % bands * band;
        Place place{line / bands, y, x, i % blocks};
        for (; place.y < std::min(y + band, height); ++place.y) run_span(s, place, std::min(kSpan, width - x));
      }
    });
  }

 private:
  static constexpr bool kInt = std::is_same_v<X, uint8_t>;

  /// The positions whose filter lies inside the image, along dimension d.
  struct Range {
    int64_t begin, end;
  };
  Range inside(int d) const {
    const int64_t out = win_.out(d), room = win_.size[d] + in_.absent[d] - win_.reach(d);  // of the last one's start
    if (in_.absent[d] == 0) return {0, out};
    const int64_t begin = std::min((in_.absent[d] + h_.stride[d] - 1) / h_.stride[d], out);
    return {begin, room < 0 ? begin : std::clamp(room / h_.stride[d] + 1, begin, out)};
  }

  const Layer& layer_;
  const LayerHeader& h_;
  const Window& win_;
  const LayerInput<X>& in_;
  const LayerOutput& out_;
  const cpu::Isa isa_;
  cpu::DepthwiseShape shape_{};
  Range inside_[2];
  cpu::DepthwiseCodesFn* fused_ = nullptr;
  std::vector<int64_t> at_, add_at_;  // of neighbouring positions
  Buffer<float> alpha_, beta_;        // codes: [images of their own range][blocks][32]; scale and b times x's scale
  Buffer<int32_t> correction_, a_correction_;  // wsum and a_sum times x's zero-point

  bool int8_adapter() const { return h_.adapter == AdapterKind::kInt8; }
  bool direct() const { return h_.segments == 1 && !h_.far; }  // one integer, one scale

  /// Where a span of output positions begins.
  struct Place {
    int64_t image, y, x, block;
  };
  struct Scratch {
    Buffer<uint8_t> strip;
    Buffer<int32_t> acc, ones;
    Buffer<float> c, up, real;
    std::vector<int32_t> zx, none;
    std::vector<float> sx;

    explicit Scratch(const Depthwise& d) {
      const auto span = static_cast<int64_t>(d.at_.size());
      const auto floats = [&](int64_t count) {
        Buffer<float> buffer(count);
        std::fill_n(buffer.get(), count, 0.0f);  // channels that do not exist are computed with
        return buffer;
      };
      c = floats(span * kLanes);
      if (!kInt) return;
      strip = Buffer<uint8_t>(cpu::depthwise_strip_bytes(d.shape_, d.shape_.width(span)));
      acc = Buffer<int32_t>(span * kLanes);
      std::fill_n(acc.get(), span * kLanes, 0);
      ones = Buffer<int32_t>(d.h_.far ? span * kLanes : 0);
      up = floats(d.h_.rank > 0 ? span * kLanes : 0);
      if (d.h_.adapter == AdapterKind::kFloat) real = floats(d.shape_.rows * d.shape_.width(span) * kLanes);
      zx.resize(at_size(span));
      none.resize(at_size(std::max<int64_t>(span, kLanes)));
      sx.resize(at_size(span));
    }
    static size_t at_size(int64_t count) { return static_cast<size_t>(count); }
  };

  void fold_scales() {
    const int64_t lanes = blocks_of(h_) * kLanes, images = in_.uniform ? 1 : win_.batch;
    if (direct()) {
      alpha_ = Buffer<float>(images * lanes);
      correction_ = Buffer<int32_t>(images * lanes);
    }
    if (h_.rank > 0) {
      beta_ = Buffer<float>(images * lanes);
      a_correction_ = Buffer<int32_t>(images * lanes);
    }
    for (int64_t image = 0; image < images; ++image)
      for (int64_t n = 0; n < lanes; ++n) {
        const int64_t i = image * lanes + n;
        if (direct()) {
          alpha_[i] = layer_.at<float>(h_.scale)[n] * in_.scale[image];
          correction_[i] = layer_.at<int32_t>(h_.wsum)[n] * in_.zero[image];
        }
        if (h_.rank > 0) {
          beta_[i] = layer_.at<float>(h_.b)[n] * in_.scale[image];
          a_correction_[i] = layer_.at<int32_t>(h_.a_sum)[n] * in_.zero[image];
        }
      }
  }
  template <typename T>
  const T* folded(const Buffer<T>& values, const Place& place) const {
    return values.get() + ((in_.uniform ? 0 : place.image) * blocks_of(h_) + place.block) * kLanes;
  }

  const float* floats(int64_t offset, int64_t block) const {
    return layer_.at<float>(offset) + block * h_.taps * kLanes;
  }

  void run_span(Scratch& s, const Place& place, int64_t count) const {
    const int64_t channel = place.block * kLanes;
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, h_.channels - channel));
    cpu::Epilogue e = out_.epilogue;
    e.c = s.c.get();
    e.bias = h_.has_bias ? layer_.at<float>(h_.bias) + channel : nullptr;
    const int64_t to = place.image * out_.image + place.y * out_.line + place.x * out_.pixel + channel;
    e.advance(to, place.image * out_.add_image + place.y * out_.add_line + place.x * out_.add_pixel + channel);
    if constexpr (kInt) {
      const X* x = in_.x + place.image * in_.image + place.y * h_.stride[0] * in_.line +
                   place.x * h_.stride[1] * in_.pixel + channel;
      cpu::k_depthwise_strip.at(isa_)(x, shape_, shape_.width(count), lanes, s.strip.get());
      if (fused_ != nullptr) return fused_(s.strip.get(), shape_, filter(place), e, count, lanes, out_.pixel);
      codes(s, x, place, count, lanes, e);
    } else {
      floats(s, place, count, lanes);
    }
    cpu::k_epilogue.at(isa_)(e, static_cast<int>(count), lanes, at_.data(), add_at_.data());
  }

  // --- Floats ------------------------------------------------------------------------------------

  /// Taps of the filter along dimension d that meet the image from output position `at` on.
  Range taps_inside(int d, int64_t at) const {
    if (at >= inside_[d].begin && at < inside_[d].end) return {0, h_.kernel[d]};
    const int64_t first = at * h_.stride[d] - in_.absent[d], step = h_.dilation[d];
    const int64_t begin = first < 0 ? std::min((-first + step - 1) / step, h_.kernel[d]) : 0;
    const int64_t end = std::clamp((win_.size[d] - first + step - 1) / step, begin, h_.kernel[d]);
    return {begin, end};
  }

  void floats(Scratch& s, const Place& place, int64_t count, int lanes) const {
    const Range rows = taps_inside(0, place.y);
    for (int64_t i = 0, next; i < count; i = next) {
      const Range columns = taps_inside(1, place.x + i);
      const bool whole = place.x + i >= inside_[1].begin && place.x + i < inside_[1].end;
      next = whole ? std::min(count, inside_[1].end - place.x) : i + 1;
      cpu::DepthwiseShape shape = shape_;
      shape.rows = rows.end - rows.begin;
      shape.columns = columns.end - columns.begin;
      const int64_t y = place.y * h_.stride[0] - in_.absent[0] + rows.begin * h_.dilation[0];
      const int64_t x = (place.x + i) * h_.stride[1] - in_.absent[1] + columns.begin * h_.dilation[1];
      const int64_t from = place.image * in_.image + y * in_.line + x * in_.pixel + place.block * kLanes;
      const float* w = floats(h_.merged, place.block) + (rows.begin * h_.kernel[1] + columns.begin) * kLanes;
      cpu::k_depthwise_f32.at(isa_)(in_.x + from, shape, w, h_.kernel[1] * kLanes, next - i, lanes,
                                    s.c.get() + i * kLanes);
    }
  }

  // --- Codes -------------------------------------------------------------------------------------

  cpu::DepthwiseFilter filter(const Place& place) const {
    cpu::DepthwiseFilter f{};
    f.w = layer_.at<int8_t>(h_.codes) + place.block * sets_bytes(h_);
    f.planes = h_.planes;
    f.correction = folded(correction_, place);
    f.alpha = folded(alpha_, place);
    if (h_.rank > 0) {
      f.a = layer_.at<int8_t>(h_.a) + place.block * a_bytes(h_);
      f.a_correction = folded(a_correction_, place);
      f.beta = folded(beta_, place);
    }
    return f;
  }

  void codes(Scratch& s, const X* x, const Place& place, int64_t count, int lanes, cpu::Epilogue& e) const {
    const int64_t image = in_.uniform ? 0 : place.image;
    std::fill_n(s.zx.begin(), count, in_.zero[image]);
    if (h_.rank > 0) {
      e.up = s.up.get();
      int8_adapter() ? exact_adapter(s, place, count, lanes) : float_adapter(s, x, place, count, lanes);
    }
    const auto* sets = layer_.at<int8_t>(h_.codes) + place.block * sets_bytes(h_);
    if (direct()) {
      multiply(s, sets, h_.planes, count, lanes, s.acc.get());
      e.acc = s.acc.get();
      e.correction = folded(correction_, place);
      e.alpha = folded(alpha_, place);
      return;
    }
    for (int64_t segment = 0; segment < h_.segments; ++segment) {
      multiply(s, sets + segment * h_.planes * filter_bytes(h_), h_.planes, count, lanes, s.acc.get());
      if (h_.far) {
        multiply(s, sets + (h_.segments * h_.planes + segment) * filter_bytes(h_), 1, count, lanes, s.ones.get());
        add_far(s, place.block, segment, count, lanes);
      } else {
        cpu::k_requantize.at(isa_)(s.acc.get(), static_cast<int>(count), s.zx.data(), layer_.wsum(place.block, segment),
                                   s.none.data(), s.none.data(), layer_.scale(place.block, segment), segment > 0,
                                   s.c.get());
      }
    }
    std::fill_n(s.sx.begin(), count, in_.scale[image]);
    e.row_scale = s.sx.data();
  }

  void multiply(Scratch& s, const int8_t* filter, int64_t planes, int64_t count, int lanes, int32_t* acc) const {
    cpu::k_depthwise_s8.at(isa_)(s.strip.get(), shape_, filter, planes, count, lanes, acc);
  }

  /// Far zero-points: exact integers in 64 bits.
  void add_far(Scratch& s, int64_t block, int64_t segment, int64_t count, int lanes) const {
    const int32_t *wsum = layer_.wsum(block, segment), *far = layer_.far(block, segment);
    const float* scale = layer_.scale(block, segment);
    const int64_t taps = h_.taps / h_.segments;
    for (int64_t i = 0; i < count; ++i)
      for (int n = 0; n < lanes; ++n) {
        const int64_t k = i * kLanes + n, zx = s.zx[static_cast<size_t>(i)];
        const int64_t sum = s.acc[k] - zx * wsum[n] - far[n] * (s.ones[k] - zx * taps);
        const float value = static_cast<float>(sum) * scale[n];
        s.c[k] = segment > 0 ? s.c[k] + value : value;
      }
  }

  void exact_adapter(Scratch& s, const Place& place, int64_t count, int lanes) const {
    multiply(s, layer_.at<int8_t>(h_.a) + place.block * a_bytes(h_), 1, count, lanes, s.acc.get());
    cpu::k_requantize.at(isa_)(s.acc.get(), static_cast<int>(count), s.zx.data(),
                               layer_.at<int32_t>(h_.a_sum) + place.block * kLanes, s.none.data(), s.none.data(),
                               folded(beta_, place), false, s.up.get());
  }

  /// A float adapter meets x - zero_point as floats.
  void float_adapter(Scratch& s, const X* x, const Place& place, int64_t count, int lanes) const {
    const int64_t width = shape_.width(count);
    cpu::DepthwiseShape shape = shape_;
    shape.pixel = kLanes;
    shape.line = width * kLanes;
    for (int64_t ky = 0; ky < shape.rows; ++ky)
      for (int64_t i = 0; i < width; ++i)
        for (int n = 0; n < lanes; ++n)
          s.real[ky * shape.line + i * kLanes + n] =
              static_cast<float>(x[ky * shape_.line + i * shape_.pixel + n] - s.zx[0]);
    cpu::k_depthwise_f32.at(isa_)(s.real.get(), shape, floats(h_.a, place.block), h_.kernel[1] * kLanes, count, lanes,
                                  s.up.get());
    const float* beta = folded(beta_, place);
    for (int64_t i = 0; i < count * kLanes; ++i) s.up[i] *= beta[i % kLanes];
  }
};

}  // namespace

template <typename X>
void run_depthwise(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output) {
  Depthwise<X>(layer, window, input, output).run();
}
template void run_depthwise(const Layer&, const Window&, const LayerInput<float>&, const LayerOutput&);
template void run_depthwise(const Layer&, const Window&, const LayerInput<uint8_t>&, const LayerOutput&);

}  // namespace cora
