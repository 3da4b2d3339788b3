// A linear layer of up to kGemvM rows: what it costs is reading the weight, so each panel is read once,
// packed as it is, and expanded in registers.
#include "ops/layer.h"

#include <type_traits>

namespace cora {

namespace {

using cpu::Isa;
using cpu::kGemvM;
using cpu::kHiddenChunk;
using cpu::kLanes;
using cpu::kQuad;

template <typename X>
class Gemv {
 public:
  static constexpr bool kInt = std::is_same_v<X, uint8_t>;

  Gemv(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output)
      : layer_(layer),
        h_(*layer.h),
        in_(input),
        out_(output),
        m_(static_cast<int>(window.rows())),
        isa_(std::min(cpu::active_isa(), Isa::kAvx512)),
        x_(pad_runs(h_.segments, layer.quads() * kQuad)),
        whole_(h_.rank > 0 && h_.segments > 1 ? pad_runs(1, layer.a_quads() * kQuad) : Buffer<X>()) {
    for (int i = 0; i < m_; ++i) {
      at_[i] = i * out_.image;
      add_at_[i] = i * out_.add_image;
    }
    if constexpr (kInt) {
      xsum_ = Buffer<int32_t>(h_.segments * kGemvM);
      for (int64_t s = 0; s < h_.segments; ++s)
        for (int i = 0; i < m_; ++i) {
          int32_t sum = 0;
          const X* x = in_.x + i * h_.run + s * layer.segment_run();
          for (int64_t k = 0; k < layer.segment_run(); ++k) sum += x[k] - in_.zero[i];
          xsum_[s * kGemvM + i] = sum;
        }
    }
  }

  void run() const {
    const int64_t grain = std::max<int64_t>(1, 32768 / (h_.run * kLanes));
    parallel_for(h_.panels, grain, [&](int64_t begin, int64_t end) {
      Buffer<float> hidden(h_.chunks * kHiddenChunk),
          b(h_.adapter == AdapterKind::kInt8 ? h_.chunks * kHiddenChunk : 0);
      for (int64_t q = 0; q < h_.chunks; ++q) compute_hidden(q, hidden.get() + q * kHiddenChunk);
      for (int64_t p = begin; p < end; ++p) run_panel(p, hidden.get(), b.get());
    });
  }

 private:
  const Layer& layer_;
  const LayerHeader& h_;
  const LayerInput<X>& in_;
  const LayerOutput& out_;
  const int m_;
  const Isa isa_;
  const Buffer<X> x_, whole_;  // x by segments, and in one run, each padded to whole quads
  Buffer<int32_t> xsum_;       // [segments][kGemvM]: sum of x - zx
  int64_t at_[kGemvM], add_at_[kGemvM];

  Buffer<X> pad_runs(int64_t segments, int64_t padded) const {
    const int64_t run = h_.run / segments;
    Buffer<X> x(m_ * segments * padded);
    for (int64_t i = 0; i < m_ * segments; ++i)
      std::fill_n(std::copy_n(in_.x + i * run, run, x.get() + i * padded), padded - run, X{0});
    return x;
  }

  void compute_hidden(int64_t q, float* hidden) const {
    const X* x = h_.segments > 1 ? whole_.get() : x_.get();
    const int64_t ldx = layer_.a_quads() * kQuad;
    const float* scale = layer_.a_scale(q);
    float c[kGemvM * kLanes] = {};
    if (h_.adapter == AdapterKind::kFloat) {
      const int64_t tap = 0;
      Buffer<float> real(kInt ? m_ * h_.run : 0);
      const float* rows[kGemvM];
      for (int i = 0; i < m_; ++i) {
        if constexpr (kInt) {
          for (int64_t k = 0; k < h_.run; ++k)
            real[i * h_.run + k] = static_cast<float>(static_cast<int32_t>(x[i * ldx + k]) - in_.zero[i]);
          rows[i] = &real[i * h_.run];
        } else {
          rows[i] = x + i * ldx;
        }
      }
      cpu::k_tile_f32.at(isa_)(rows, &tap, 1, h_.run, layer_.a<float>(q), m_, kLanes, c);
    } else if constexpr (kInt) {
      int32_t acc[kGemvM * kLanes];
      cpu::k_gemv_s8.at(isa_)(layer_.a<uint8_t>(q), 8, layer_.a_quads(), x, ldx, m_, acc);
      for (int i = 0; i < m_; ++i)
        for (int n = 0; n < kLanes; ++n)
          c[i * kLanes + n] = static_cast<float>(acc[i * kLanes + n] - in_.zero[i] * layer_.a_sum(q)[n]) * scale[n];
    } else {
      float zero[kLanes];
      std::fill_n(zero, kLanes, 128.0f);
      cpu::k_gemv_f32.at(isa_)(layer_.a<uint8_t>(q), 8, layer_.a_quads(), zero, x, ldx, m_, c);
      for (int i = 0; i < m_ * kLanes; ++i) c[i] *= scale[i % kLanes];
    }
    if constexpr (kInt)
      for (int i = 0; i < m_ * kLanes; ++i) c[i] *= in_.scale[i / kLanes];
    cpu::k_store_hidden.at(isa_)(c, m_, kLanes, hidden);
  }

  void run_panel(int64_t p, const float* hidden, float* b) const {
    const int64_t ldx = h_.segments * layer_.quads() * kQuad;
    alignas(64) float c[kGemvM * kLanes], up[kGemvM * kLanes];
    for (int64_t s = 0; s < h_.segments; ++s) {
      const X* x = x_.get() + s * layer_.quads() * kQuad;
      const float* scale = layer_.scale(p, s);
      if constexpr (kInt) {
        // The kernel multiplies codes as they are (8 bits: less 128): all of the zero-point is far.
        const int32_t base = h_.bits == 8 ? 128 : 0;
        alignas(64) int32_t acc[kGemvM * kLanes], wsum[kLanes], far[kLanes];
        for (int n = 0; n < kLanes; ++n) {
          wsum[n] = layer_.wsum(p, s)[n] + static_cast<int32_t>(layer_.segment_run()) * (layer_.offset(p, s)[n] - base);
          far[n] = layer_.zero_point(p, s)[n] - base;
        }
        cpu::k_gemv_s8.at(isa_)(layer_.codes(p, s), h_.bits, layer_.quads(), x, ldx, m_, acc);
        cpu::k_requantize.at(isa_)(acc, m_, in_.zero.get(), wsum, far, &xsum_[s * kGemvM], scale, s > 0, c);
      } else {
        alignas(64) float part[kGemvM * kLanes], zero[kLanes];
        for (int n = 0; n < kLanes; ++n) zero[n] = static_cast<float>(layer_.zero_point(p, s)[n]);
        cpu::k_gemv_f32.at(isa_)(layer_.codes(p, s), h_.bits, layer_.quads(), zero, x, ldx, m_, part);
        for (int i = 0; i < m_ * kLanes; ++i) {
          const float value = part[i] * scale[i % kLanes];
          c[i] = s > 0 ? c[i] + value : value;
        }
      }
    }
    cpu::Epilogue e = out_.epilogue;
    e.c = c;
    if constexpr (kInt) e.row_scale = in_.scale.get();
    if (h_.rank > 0) {
      const void* weights = layer_.b<float>(p);
      if (h_.adapter == AdapterKind::kInt8) {
        cpu::k_expand_up.at(isa_)(layer_.b<int8_t>(p), h_.rank, b);
        weights = b;
      }
      cpu::k_up_project.at(isa_)(hidden, m_, m_, h_.rank, weights, up);
      e.up = up;
    }
    e.bias = layer_.bias(p);
    const int64_t channel = p * kLanes;
    e.advance(channel, channel);
    cpu::k_epilogue.at(isa_)(e, m_, static_cast<int>(std::min<int64_t>(kLanes, h_.n - channel)), at_, add_at_);
  }
};

}  // namespace

template <typename X>
void run_gemv(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output) {
  Gemv<X>(layer, window, input, output).run();
}
template void run_gemv(const Layer&, const Window&, const LayerInput<float>&, const LayerOutput&);
template void run_gemv(const Layer&, const Window&, const LayerInput<uint8_t>&, const LayerOutput&);

}  // namespace cora
