// The packed matrix product by tiles: output positions by panels of 32 output channels.
//
// A task is a range of position tiles by a range of panels. It takes as many panels as its share of L2
// holds, expands their weights there once, and runs all its tiles over them: the adapter's hidden
// values first (A's rows are panels like the weight's), then panel by panel the product, the adapter's
// second half and the epilogue, while the tile is in L1. With AMX the epilogue is left pending and done
// during the next product. Nothing is exchanged between tasks, and every sum runs over K in one order,
// so thread counts agree bit for bit.
#include "ops/tile_rows.h"

#include <limits>

namespace cora {

namespace {

using cpu::Isa;
using cpu::kHiddenChunk;
using cpu::kLanes;
using cpu::kMaxTileM;
using cpu::kQuad;
using cpu::kQuadRow;

constexpr int64_t kPanelBytes = 512 * 1024;  // expanded panels of a task: half of the smallest common L2
constexpr int64_t kL1Panel = 24 * 1024, kL1Tiles = 12 * 1024, kMaxBlockTiles = 8;
constexpr int64_t kLongRows = 32768;  // of K: sums of so many weights may be 2^22
constexpr int64_t kFewTiles = 2;      // expanding a panel for each of them is cheaper than writing it to L2
constexpr int64_t kStretch = kL1Panel / (kLanes * 4);  // of K, of a panel of floats

template <typename X>
class Tiles {
 public:
  static constexpr bool kInt = std::is_same_v<X, uint8_t>, kPlanes = std::is_same_v<X, cpu::Bf16>;
  static constexpr bool kFloat = !kInt && !kPlanes;
  using Panel = std::conditional_t<kInt, int8_t, X>;  // an expanded weight

  Tiles(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output)
      : layer_(layer),
        h_(*layer.h),
        win_(window),
        in_(input),
        out_(output),
        isa_(kInt || kPlanes ? cpu::active_isa() : std::min(cpu::active_isa(), Isa::kAvx512)),
        inline_(h_.rank <= cpu::kInlineRank && isa_ != Isa::kAmx),  // a tile product is cheaper there
        up_isa_(h_.adapter == AdapterKind::kInt8 && !inline_ ? isa_ : std::min(isa_, Isa::kAvx512)),
        shape_(cpu::tile_shape(isa_)),
        by_row_(kInt && !input.uniform),
        direct_(kInt && h_.segments == 1 && !h_.far && h_.adapter != AdapterKind::kFloat &&
                (!by_row_ || (isa_ == Isa::kAmx && !output.epilogue.codes && h_.taps * h_.run < kLongRows))),
        fused_(isa_ == Isa::kAmx && direct_),
        x_scale_(kInt && !by_row_ ? input.scale[0] : 1.0f),
        x_zero_(!kInt || by_row_ ? 0
                : fused_         ? -input.zero[0]
                                 : input.zero[0]),
        unit_(direct_ && output.epilogue.codes && (output.epilogue.add == nullptr || output.epilogue.add_codes)
                  ? output.epilogue.inverse_scale
                  : 1.0f),
        epilogue_(output.epilogue.in_units(unit_)),
        pipelined_(isa_ == Isa::kAmx && kPlanes),
        align_(kPlanes ? shape_.align / static_cast<int>(sizeof(X)) : shape_.align),
        quads_(round_up(layer.segment_run(), align_) / kQuad),
        a_quads_(round_up(h_.run, align_) / kQuad),
        ready_(kInt && h_.ready && quads_ == layer.quads()),
        a_ready_(kInt && h_.a_ready && a_quads_ == layer.a_quads()),
        place_(layer, window, input, output, isa_, align_, !direct_ || by_row_, fused_,
               ceil_div(h_.panels * h_.groups, fitting_panels())),
        tiles_(place_.tiles()) {}

  void run() const {
    const int64_t threads = torch::stable::get_num_threads(), panels = h_.groups * h_.panels;
    // The split that leaves the slowest thread least: expanding a panel costs about one tile of it. Threads that split
    // the panels read all of x and write to the same lines of y, which costs an eighth.
    int64_t n_parts = 1, best = INT64_MAX;
    for (int64_t parts = 1; parts <= std::min(threads, panels); ++parts) {
      const int64_t tiles = ceil_div(tiles_, threads / parts), share = ceil_div(panels, parts);
      const int64_t work = share * (tiles + 1) + tiles * h_.chunks * ceil_div(share, h_.panels);
      const int64_t cost = parts > 1 ? 9 * work : 8 * work;
      if (cost < best) {
        best = cost;
        n_parts = parts;
      }
    }
    const int64_t m_parts = std::clamp<int64_t>(threads / n_parts, 1, tiles_);
    const int64_t work = h_.n / h_.groups * h_.taps * h_.run * win_.rows();  // multiplications
    parallel_for(n_parts * m_parts, work < 100000 ? n_parts * m_parts : 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / m_parts, m = task % m_parts;
        run_task(panels * n / n_parts, panels * (n + 1) / n_parts, tiles_ * m / m_parts, tiles_ * (m + 1) / m_parts);
      }
    });
  }

 private:
  const Layer& layer_;
  const LayerHeader& h_;
  const Window& win_;
  const LayerInput<X>& in_;
  const LayerOutput& out_;
  const Isa isa_;
  const bool inline_;  // the epilogue multiplies by B
  const Isa up_isa_;
  const cpu::TileShape shape_;
  const bool by_row_;              // rows of x have scales and zero-points of their own
  const bool direct_;              // a tile's integers go straight to the epilogue
  const bool fused_;               // which is part of the kernel (cpu/codes_amx.cpp)
  const float x_scale_;            // of codes, where all have one
  const int32_t x_zero_;           // and their zero-point; fused: negative
  const float unit_;               // of what it computes: that of the codes to become of it, if it can be
  const cpu::Epilogue epilogue_;   // in it
  const bool pipelined_;           // the epilogue is done during the next product
  const int64_t align_;            // elements of K a run is padded to
  const int64_t quads_, a_quads_;  // of a run, padded as the level wants it
  const bool ready_, a_ready_;     // panels (A's) are read as they are stored
  const TileRows<X> place_;
  const int64_t tiles_;

  // --- Weights -----------------------------------------------------------------------------------

  /// Quad-rows of `taps` runs -> a panel whose runs have `quads` of them, the surplus zero.
  void expand(const uint8_t* packed, int bits, int64_t stored, int64_t quads, const uint8_t* offset,
              int8_t* panel) const {
    const auto kernel = cpu::k_expand.at(isa_);
    if (stored == quads) return kernel(packed, bits, h_.taps * quads, offset, panel);
    for (int64_t t = 0; t < h_.taps; ++t, packed += stored * cpu::quad_row_bytes(bits), panel += quads * kQuadRow) {
      kernel(packed, bits, stored, offset, panel);
      std::memset(panel + stored * kQuadRow, 0, static_cast<size_t>((quads - stored) * kQuadRow));
    }
  }
  /// The same as floats; whole quads only, so a run's last quad is cut to the run.
  void expand_f32(const uint8_t* packed, int bits, int64_t run, const uint8_t* offset, const float* scale,
                  const int32_t* far, int8_t* bytes, float* panel) const {
    const int64_t quads = ceil_div(run, kQuad);
    cpu::k_expand.at(isa_)(packed, bits, h_.taps * quads, offset, bytes);
    if (run % kQuad == 0) return cpu::k_panel_f32.at(isa_)(bytes, h_.taps * quads, scale, far, panel);
    Buffer<float> whole(quads * kQuadRow);
    for (int64_t t = 0; t < h_.taps; ++t) {
      cpu::k_panel_f32.at(isa_)(bytes + t * quads * kQuadRow, quads, scale, far, whole.get());
      std::copy_n(whole.get(), run * kLanes, panel + t * run * kLanes);
    }
  }

  /// The same as bfloat16, some quads at a time: the bytes stay in L1.
  void expand_bf16(const uint8_t* packed, int bits, int64_t run, int64_t quads, const uint8_t* offset,
                   const int32_t* far, cpu::Bf16* panel) const {
    constexpr int64_t kQuads = 64;
    alignas(64) int8_t bytes[kQuads * kQuadRow];
    const int64_t stored = ceil_div(run, kQuad);
    for (int64_t t = 0; t < h_.taps; ++t)
      for (int64_t q = 0; q < quads; q += kQuads) {
        const int64_t codes = std::clamp<int64_t>(stored - q, 0, kQuads), count = std::min(quads - q, kQuads);
        cpu::k_expand.at(isa_)(packed, bits, codes, offset, bytes);
        cpu::k_panel_bf16.at(isa_)(bytes, run - q * kQuad, count, far, panel);
        packed += codes * cpu::quad_row_bytes(bits);
        panel += count * kQuadRow;
      }
  }

  /// The largest weight that codes without their offset can be.
  int widest(const uint8_t* offset) const {
    const int top = (1 << h_.bits) - 1;
    int most = 1;
    for (int n = 0; n < kLanes; ++n) most = std::max({most, int{offset[n]}, top - offset[n]});
    return most;
  }

  int64_t segment_size() const {  // of an expanded panel, elements
    return h_.taps * (kInt || kPlanes ? quads_ * kQuadRow : layer_.segment_run() * kLanes);
  }
  /// Panels whose expansion stays in L2; where there are planes, that has 2 MB.
  int64_t fitting_panels() const {
    const int64_t bytes = h_.segments * segment_size() * static_cast<int64_t>(sizeof(Panel));
    return std::max<int64_t>(1, kPanelBytes * (kPlanes ? 2 : 1) / bytes);
  }
  int64_t chunk_size() const { return h_.taps * (kInt || kPlanes ? a_quads_ * kQuadRow : h_.run * kLanes); }

  /// What a task keeps of its panels and its group's adapter.
  struct Scratch {
    Columns<X> columns;
    std::unique_ptr<Rows<X>[]> rows;  // two blocks of tiles: a pending epilogue may refer to the one before
    Buffer<int32_t> acc[2];
    Buffer<float> sum[2], up[2];
    cpu::Pending pending;
    bool packed;                             // panels are not expanded here but tile by tile, B's panel by panel
    Buffer<cpu::CodesPanel> fused, a_fused;  // fused: the task's panels, A's chunks and located tiles
    std::unique_ptr<cpu::CodesRows[]> fused_rows;
    cpu::CodesTile tile{};
    cpu::Finish finish[2]{};  // the last one's is at turn ^ 1
    int turn = 0;
    Buffer<Panel> panels, chunks;
    Buffer<int8_t> bytes;
    Buffer<float> products;                    // of floats: [tiles][kMaxTileM][32]
    Buffer<float> up_weights;                  // B as the level multiplies it
    Buffer<float> alpha, a_alpha;              // [panels][32], [chunks][32]: weight scale times x's
    Buffer<float> bias;                        // [panels][32], of codes
    float up_bound;                            // the adapter's part of an output is not above it
    Buffer<int32_t> correction, a_correction;  // the same: zx times the weights' sum (fused: negative)
    Buffer<int32_t> widest;                    // [panels][segments]
    Buffer<float> hidden, real;                // [tiles][chunks][kHiddenChunk]
  };

  void expand_panel(Scratch& s, int64_t p, int64_t index) const {
    for (int64_t seg = 0; seg < h_.segments; ++seg) {
      Panel* panel = s.panels.get() + (s.packed || ready_ ? 0 : (index * h_.segments + seg) * segment_size());
      const uint8_t* offset = layer_.stored_offset(p, seg);
      const int32_t* far = layer_.far(p, seg);
      if constexpr (kInt) {
        if (!s.packed && !ready_) expand(layer_.codes(p, seg), h_.bits, layer_.quads(), quads_, offset, panel);
        s.widest[index * h_.segments + seg] = widest(layer_.offset(p, seg));
      } else if constexpr (kPlanes)
        expand_bf16(layer_.codes(p, seg), h_.bits, layer_.segment_run(), quads_, offset, far, panel);
      else
        expand_f32(layer_.codes(p, seg), h_.bits, layer_.segment_run(), offset, layer_.scale(p, seg), far,
                   s.bytes.get(), panel);
    }
    if (!s.packed) expand_up(s, p, index);
    if constexpr (kInt) {
      for (int n = 0; n < kLanes; ++n) {
        s.alpha[index * kLanes + n] = layer_.scale(p, 0)[n] * x_scale_ * unit_;
        s.correction[index * kLanes + n] = x_zero_ * layer_.wsum(p, 0)[n];
        s.bias[index * kLanes + n] = layer_.bias(p) != nullptr ? layer_.bias(p)[n] * unit_ : 0.0f;
      }
      if (fused_) fuse_panel(s, p, index);
    }
  }

  void expand_up(Scratch& s, int64_t p, int64_t index) const {
    if (h_.adapter == AdapterKind::kInt8)
      cpu::k_expand_up.at(up_isa_)(layer_.b<int8_t>(p), h_.rank, s.up_weights.get() + index * h_.chunks * kHiddenChunk);
  }

  /// A panel as the fused kernel takes it.
  void fuse_panel(Scratch& s, int64_t p, int64_t index) const {
    const cpu::Epilogue& e = epilogue_;
    const int64_t first = p % h_.panels * kLanes, channel = p / h_.panels * layer_.group_n() + first;
    const float most = 255.0f * static_cast<float>(h_.taps * h_.run * s.widest[index]);
    float bound = s.up_bound + (e.add != nullptr ? 512.0f * std::abs(e.add_scale) : 0.0f);
    for (int n = 0; n < kLanes; ++n)
      bound += std::abs(s.alpha[index * kLanes + n]) * most + std::abs(s.bias[index * kLanes + n]);
    const bool bounded = (e.add == nullptr || e.add_codes) && bound < 1e9f;  // a NaN is not
    cpu::CodesPanel& panel = s.fused[index] = {};
    set_panel(panel, this->panel(s, p, index, 0), quads_, lanes_of(layer_.group_n(), first));
    panel.packed = s.packed ? layer_.codes(p, 0) : nullptr;
    panel.bits = h_.bits;
    panel.offset = layer_.offset(p, 0);
    panel.start = x_zero_ == 0 ? nullptr : &s.correction[index * kLanes];
    panel.alpha = &s.alpha[index * kLanes];
    panel.result = !e.codes ? cpu::Result::kFloats : bounded ? cpu::Result::kBounded : cpu::Result::kCodes;
    panel.wsum = by_row_ ? layer_.wsum(p, 0) : nullptr;
    panel.bias = &s.bias[index * kLanes];
    panel.e = &e;
    panel.added = e.add == nullptr ? cpu::Added::kNothing : e.add_codes ? cpu::Added::kCodes : cpu::Added::kFloats;
    panel.y = static_cast<char*>(e.y) + channel * (e.codes ? 1 : static_cast<int64_t>(sizeof(float)));
    panel.add = static_cast<const char*>(e.add) + channel * (e.add_codes ? 1 : static_cast<int64_t>(sizeof(float)));
    panel.rank = h_.rank;
    if (h_.rank > 0) panel.b = s.up_weights.get() + (s.packed ? 0 : index) * h_.chunks * kHiddenChunk;
    panel.up_bias = by_row_ ? kNoBias : panel.bias;
  }
  void set_panel(cpu::CodesPanel& panel, const Panel* weights, int64_t quads, int lanes) const {
    if constexpr (kInt) panel.weights = weights;
    panel.steps = quads * kQuad / align_;
    panel.lanes = lanes;
  }

  void expand_chunks(Scratch& s, int64_t g) const {
    static constexpr int32_t kNear[kLanes] = {};
    uint8_t offset[kLanes];
    std::fill_n(offset, kLanes, static_cast<uint8_t>(h_.a_ready ? 0 : 128));
    s.up_bound = 0.0f;
    for (int64_t q = 0; q < h_.chunks; ++q) {
      const int64_t at = g * h_.chunks + q;
      Panel* panel = s.chunks.get() + (a_ready_ ? 0 : q * chunk_size());
      if (h_.adapter == AdapterKind::kFloat) {
        if constexpr (kFloat) std::memcpy(panel, layer_.a<float>(at), static_cast<size_t>(layer_.a_size()));
      } else if constexpr (kInt) {
        if (!a_ready_) expand(layer_.a<uint8_t>(at), 8, layer_.a_quads(), a_quads_, offset, panel);
        for (int n = 0; n < kLanes; ++n) {
          s.a_alpha[q * kLanes + n] = layer_.a_scale(at)[n] * x_scale_ * unit_;
          s.up_bound += 128.0f * 255.0f * static_cast<float>(h_.taps * h_.run * h_.a_widest) *
                        std::abs(s.a_alpha[q * kLanes + n]);
          s.a_correction[q * kLanes + n] = x_zero_ * layer_.a_sum(at)[n];
        }
        if (fused_) {
          cpu::CodesPanel& fused = s.a_fused[q] = {};
          set_panel(fused, chunk(s, at, q), a_quads_, lanes_of(h_.rank, q * kLanes));
          fused.start = x_zero_ == 0 ? nullptr : &s.a_correction[q * kLanes];
          fused.alpha = &s.a_alpha[q * kLanes];
          fused.result = cpu::Result::kHidden;
          fused.chunk = q;
          fused.wsum = by_row_ ? layer_.a_sum(at) : nullptr;
        }
      } else if constexpr (kPlanes) {
        expand_bf16(layer_.a<uint8_t>(at), 8, h_.run, a_quads_, offset, kNear, panel);
      } else {
        expand_f32(layer_.a<uint8_t>(at), 8, h_.run, offset, layer_.a_scale(at), kNear, s.bytes.get(), panel);
      }
    }
  }

  const Panel* panel(const Scratch& s, int64_t p, int64_t index, int64_t seg) const {
    if constexpr (kInt)
      if (ready_) return reinterpret_cast<const int8_t*>(layer_.codes(p, seg));
    return s.panels.get() + (s.packed ? 0 : (index * h_.segments + seg) * segment_size());
  }
  /// at: of the chunk over all groups, q within its own.
  const Panel* chunk(const Scratch& s, int64_t at, int64_t q) const {
    if constexpr (kInt)
      if (a_ready_) return layer_.a<int8_t>(at);
    return s.chunks.get() + q * chunk_size();
  }

  // --- One tile ----------------------------------------------------------------------------------

  static int lanes_of(int64_t count, int64_t first) {
    return static_cast<int>(std::min<int64_t>(kLanes, count - first));
  }

  /// The adapter's hidden values of a tile, chunk by chunk.
  void compute_hidden(Scratch& s, int64_t slot, int64_t g, float* hidden) const {
    const Rows<X>& rows = s.rows[slot];
    for (int64_t q = 0; q < h_.chunks; ++q) {
      if (fused_) {
        run_fused(s, s.a_fused[q], slot);
        continue;
      }
      const int64_t at = g * h_.chunks + q;
      const int lanes = lanes_of(h_.rank, q * kLanes);
      alignas(64) float c[kMaxTileM * kLanes];
      void* const u = hidden + q * kHiddenChunk;
      if constexpr (kInt) {
        if (h_.adapter == AdapterKind::kInt8) {
          hidden_from_codes(s, rows, at, q, lanes, u);
          continue;
        }
        std::fill_n(c, rows.m * kLanes, 0.0f);
        hidden_from_floats(s, rows, layer_.a<float>(at), lanes, c);
        for (int i = 0; i < rows.m * kLanes; ++i) c[i] *= rows.sx[i / kLanes];
      } else if constexpr (kPlanes) {
        cpu::k_tile_bf16.at(isa_)(rows.row, rows.plane, in_.planes, rows.tap, h_.taps, a_quads_, chunk(s, at, q),
                                  rows.m, block_of(rows), lanes, c, &s.pending);
        cpu::k_rescale.at(isa_)(c, rows.m, layer_.a_scale(at), false, c);
      } else {
        std::fill_n(c, rows.m * kLanes, 0.0f);
        cpu::k_tile_f32.at(isa_)(rows.row, rows.tap, h_.taps, h_.run, chunk(s, at, q), rows.m, lanes, c);
      }
      cpu::k_store_hidden.at(up_isa_)(c, rows.m, lanes, u);
    }
  }

  void hidden_from_codes(Scratch& s, const Rows<X>& rows, int64_t at, int64_t q, int lanes, void* u) const {
    static constexpr int32_t kZero[kMaxTileM] = {};
    alignas(64) int32_t acc[kMaxTileM * kLanes];
    cpu::k_tile_s8.at(isa_)(rows.row, rows.tap, h_.taps, a_quads_, reinterpret_cast<const int8_t*>(chunk(s, at, q)),
                            h_.a_widest, rows.m, block_of(rows), lanes, acc);
    if (in_.uniform)
      return cpu::k_quantized_hidden.at(up_isa_)(acc, &s.a_correction[q * kLanes], &s.a_alpha[q * kLanes], rows.m,
                                                 lanes, u);
    alignas(64) float c[kMaxTileM * kLanes];
    cpu::k_requantize.at(isa_)(acc, rows.m, rows.zx, layer_.a_sum(at), kZero, kZero, layer_.a_scale(at), false, c);
    for (int i = 0; i < rows.m * kLanes; ++i) c[i] *= rows.sx[i / kLanes];
    cpu::k_store_hidden.at(up_isa_)(c, rows.m, lanes, u);
  }
  /// A tile's rows as the fused kernel takes them.
  void fuse_rows(cpu::CodesRows& to, const Rows<X>& rows, float* hidden) const {
    if constexpr (kInt) {
      to.block = block_of(rows);
      to.blocks = rows.m > to.block ? 2 : 1;
      to.x[0] = rows.row[0];
      to.x[1] = rows.row[rows.m - to.block];
      to.x_stride = place_.row_stride();
      to.tap = rows.tap;
      to.taps = h_.taps;
      to.hidden = hidden;
      to.count = rows.count;
      to.from = rows.from;
      to.at = rows.at;
      to.add_at = rows.add_at;
      to.zx = rows.zx;
      to.sx = rows.sx;
    }
  }
  /// A tile's products with a panel, while what followed the last ones is done; what follows these stays pending.
  /// Instructions between two tiles cost more than they look: a core that has hundreds of them before it does not see
  /// the next tile's products while it waits for this one's. So all that can be is known before.
  void run_fused(Scratch& s, const cpu::CodesPanel& panel, int64_t slot) const {
    s.tile.panel = &panel;
    s.tile.rows = &s.fused_rows[static_cast<size_t>(slot)];
    s.tile.sum = s.acc[s.turn].get();
    s.tile.up = s.up[s.turn].get();
    cpu::k_codes_tile.at(Isa::kAmx)(s.tile, s.finish[s.turn ^ 1]);
    cpu::Finish& finish = s.finish[s.turn];
    finish.panel = s.tile.panel;
    finish.rows = s.tile.rows;
    finish.sum = s.tile.sum;
    finish.up = s.tile.up;
    s.turn ^= 1;
  }
  static constexpr float kNoBias[kLanes] = {};
  int block_of(const Rows<X>& rows) const { return std::min(rows.m, place_.block()); }

  /// Quantised input, float adapter: x - zx as floats, exact, then the float tile.
  void hidden_from_floats(Scratch& s, const Rows<X>& rows, const float* panel, int lanes, float* c) const {
    const int64_t k = h_.taps * h_.run, zero_tap = 0;
    if (s.real.get() == nullptr) s.real = Buffer<float>(kMaxTileM * k);
    const float* pointers[kMaxTileM];
    for (int i = 0; i < rows.m; ++i) {
      float* to = s.real.get() + i * k;
      pointers[i] = to;
      for (int64_t t = 0; t < h_.taps; ++t)
        for (int64_t e = 0; e < h_.run; ++e)
          *to++ = static_cast<float>(static_cast<int32_t>(rows.row[i][rows.tap[t] + e]) - rows.zx[i]);
    }
    constexpr int kFloatM = 12;
    for (int i = 0; i < rows.m; i += kFloatM)
      cpu::k_tile_f32()(pointers + i, &zero_tap, 1, k, panel, std::min(kFloatM, rows.m - i), lanes, c + i * kLanes);
  }

  /// The float products of some tiles with one panel: all take a stretch of K before the next one, which so is
  /// read from L1. Sums are as in one go.
  void multiply_floats(Scratch& s, Rows<X>* rows, int64_t count, int64_t p, int64_t index) const {
    const int lanes = lanes_of(layer_.group_n(), p % h_.panels * kLanes);
    const int64_t run = layer_.segment_run(), taps = std::max<int64_t>(1, kStretch / run);
    std::fill_n(s.products.get(), count * kMaxTileM * kLanes, 0.0f);
    for (int64_t seg = 0; seg < h_.segments; ++seg) {
      const float* w = panel(s, p, index, seg);
      for (int64_t t = 0; t < h_.taps; t += taps)
        for (int64_t k = 0; k < run; k += kStretch) {
          const int64_t some = std::min(taps, h_.taps - t), length = std::min(kStretch, run - k);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t from = rows[i].tap[t] + k;
            cpu::k_tile_f32.at(isa_)(place_.segment(rows[i], seg), some > 1 ? rows[i].tap + t : &from, some, length, w,
                                     rows[i].m, lanes, s.products.get() + i * kMaxTileM * kLanes);
          }
          w += some * length * kLanes;
        }
    }
  }

  /// One tile by one panel, and what follows the product; `product` holds it already where it is of floats.
  void multiply(Scratch& s, Rows<X>& rows, int64_t p, int64_t index, const float* hidden, const float* product) const {
    const int64_t first = p % h_.panels * kLanes;
    const int lanes = lanes_of(layer_.group_n(), first);
    float* const up = s.up[s.turn].get();
    alignas(64) float c[kMaxTileM * kLanes];
    cpu::Epilogue e = epilogue_;
    if constexpr (kInt) {
      int32_t* const acc = s.acc[s.turn].get();
      for (int64_t seg = 0; seg < h_.segments; ++seg) {
        cpu::k_tile_s8.at(isa_)(place_.segment(rows, seg), rows.tap, h_.taps, quads_, panel(s, p, index, seg),
                                s.widest[index * h_.segments + seg], rows.m, block_of(rows), lanes, acc);
        if (!direct_) requantize(rows, p, seg, acc, c);
      }
      if (direct_) {
        e.acc = acc;
        e.correction = s.correction.get() + index * kLanes;
        e.alpha = s.alpha.get() + index * kLanes;
      } else {
        e.c = c;
        e.row_scale = rows.sx;
      }
    } else if constexpr (kPlanes) {
      float* const sum = s.sum[s.turn].get();
      for (int64_t seg = 0; seg < h_.segments; ++seg) {
        cpu::k_tile_bf16.at(isa_)(place_.segment(rows, seg), rows.plane, in_.planes, rows.tap, h_.taps, quads_,
                                  panel(s, p, index, seg), rows.m, block_of(rows), lanes, h_.segments > 1 ? c : sum,
                                  &s.pending);
        if (h_.segments > 1) cpu::k_rescale.at(isa_)(c, rows.m, layer_.scale(p, seg), seg > 0, sum);
      }
      e.c = sum;
      if (h_.segments == 1) e.alpha = layer_.scale(p, 0);
    } else {
      e.c = product;
    }
    flush(s);
    if (h_.rank > 0) {
      const void* b = h_.adapter == AdapterKind::kInt8
                          ? static_cast<const void*>(s.up_weights.get() + index * h_.chunks * kHiddenChunk)
                          : layer_.b<float>(p);
      if (inline_) {
        e.u = hidden;
        e.b = static_cast<const float*>(b);
        e.rank = h_.rank;
      } else {
        cpu::k_up_project.at(up_isa_)(hidden, rows.m, block_of(rows), h_.rank, b, up);
        e.up = up;
      }
    }
    e.bias = kInt && layer_.bias(p) != nullptr ? &s.bias[index * kLanes] : layer_.bias(p);
    const int64_t channel = p / h_.panels * layer_.group_n() + first;
    e.advance(channel, channel);
    s.pending.e = e;
    s.pending.m = rows.m;
    s.pending.lanes = lanes;
    s.pending.at = rows.at;
    s.pending.add_at = rows.add_at;
    if (pipelined_)
      s.turn ^= 1;
    else
      flush(s);
  }
  void flush(Scratch& s) const {
    if (fused_) return cpu::k_finish.at(Isa::kAmx)(s.finish[s.turn ^ 1]);
    if (s.pending.m > 0) s.pending.take(s.pending.m, cpu::k_epilogue.at(isa_));
  }

  /// c (+)= a segment's exact integers times their scale.
  void requantize(Rows<X>& rows, int64_t p, int64_t seg, const int32_t* acc, float* c) const {
    int32_t xsum[kMaxTileM] = {};
    if (h_.far) {
      cpu::k_row_sums.at(isa_)(place_.segment(rows, seg), rows.tap, h_.taps, layer_.segment_run(), rows.m, xsum);
      for (int i = 0; i < rows.m; ++i) xsum[i] -= rows.zx[i] * static_cast<int32_t>(h_.taps * layer_.segment_run());
    }
    const int32_t *wsum = layer_.wsum(p, seg), *far = layer_.far(p, seg);
    const float* scale = layer_.scale(p, seg);
    if (h_.narrow) return cpu::k_requantize.at(isa_)(acc, rows.m, rows.zx, wsum, far, xsum, scale, seg > 0, c);
    for (int i = 0; i < rows.m; ++i)  // far zero-points: the same in 64 bits
      for (int n = 0; n < kLanes; ++n) {
        const int64_t sum = acc[i * kLanes + n] - int64_t{rows.zx[i]} * wsum[n] - int64_t{far[n]} * xsum[i];
        const float value = static_cast<float>(sum) * scale[n];
        c[i * kLanes + n] = seg > 0 ? c[i * kLanes + n] + value : value;
      }
  }

  // --- A task ------------------------------------------------------------------------------------

  void run_task(int64_t p_begin, int64_t p_end, int64_t t_begin, int64_t t_end) const {
    const cpu::TileSession session(isa_, place_.block());
    const int64_t panel_size = h_.segments * segment_size(), tiles = t_end - t_begin;
    const int64_t block_panels = std::min({fitting_panels(), p_end - p_begin, h_.panels});
    // Tiles that take turns with one panel, so that a panel which fits L1 stays there; of floats, a stretch of it.
    const int64_t panel_bytes = panel_size * static_cast<int64_t>(sizeof(Panel));
    const int64_t tile_bytes = place_.tile_elements() * (kPlanes ? static_cast<int64_t>(sizeof(X)) : 1);
    const int64_t block_tiles = kFloat ? kMaxBlockTiles
                                : panel_bytes <= kL1Panel
                                    ? std::clamp<int64_t>(kL1Tiles / tile_bytes, 1, kMaxBlockTiles)
                                    : 1;
    // Hidden values are kept for the group's next block of panels, if there is one.
    const bool keep = block_panels < std::min(p_end - p_begin, h_.panels);
    Scratch s;
    s.columns = place_.columns(2 * block_tiles);
    s.rows.reset(new Rows<X>[static_cast<size_t>(2 * block_tiles)]);
    for (int i = 0; i < 2; ++i) {
      s.acc[i] = Buffer<int32_t>(kInt ? kMaxTileM * kLanes : 0);
      s.sum[i] = Buffer<float>(kPlanes ? kMaxTileM * kLanes : 0);
      s.up[i] = Buffer<float>(h_.rank > 0 ? kMaxTileM * kLanes : 0);
    }
    s.packed = fused_ && !ready_ && tiles <= kFewTiles && layer_.quads() == quads_;
    s.panels = Buffer<Panel>(s.packed || ready_ ? 0 : block_panels * panel_size);
    s.alpha = Buffer<float>(kInt ? block_panels * kLanes : 0);
    s.bias = Buffer<float>(kInt ? block_panels * kLanes : 0);
    s.fused = Buffer<cpu::CodesPanel>(fused_ ? block_panels : 0);
    s.a_fused = Buffer<cpu::CodesPanel>(fused_ ? h_.chunks : 0);
    if (fused_) s.fused_rows.reset(new cpu::CodesRows[static_cast<size_t>(2 * block_tiles)]);
    s.up_bound = 0.0f;
    s.correction = Buffer<int32_t>(kInt ? block_panels * kLanes : 0);
    s.widest = Buffer<int32_t>(kInt ? block_panels * h_.segments : 0);
    s.products = Buffer<float>(kFloat ? block_tiles * kMaxTileM * kLanes : 0);
    if (kFloat) s.bytes = Buffer<int8_t>(h_.taps * (round_up(h_.run, kQuad)) * kLanes);
    if (h_.rank > 0) {
      s.chunks = Buffer<Panel>(a_ready_ ? 0 : h_.chunks * chunk_size());
      s.a_alpha = Buffer<float>(kInt ? h_.chunks * kLanes : 0);
      s.a_correction = Buffer<int32_t>(kInt ? h_.chunks * kLanes : 0);
      const int64_t kept = s.packed ? 1 : block_panels;
      s.up_weights = Buffer<float>(h_.adapter == AdapterKind::kInt8 ? kept * h_.chunks * kHiddenChunk : 0);
      s.hidden = Buffer<float>((keep ? tiles : block_tiles) * h_.chunks * kHiddenChunk);
    }
    int64_t group = -1;
    for (int64_t p = p_begin; p < p_end;) {
      const int64_t g = p / h_.panels, group_end = std::min(p_end, (g + 1) * h_.panels);
      const int64_t block_end = std::min(group_end, p + block_panels);
      const bool first = g != group;
      if (first && h_.rank > 0) expand_chunks(s, g);
      for (int64_t i = p; i < block_end; ++i) expand_panel(s, i, i - p);
      const auto hidden = [&](int64_t tile) {
        const int64_t i = tile - t_begin;
        return s.hidden.get() + (keep ? i : i % block_tiles) * h_.chunks * kHiddenChunk;
      };
      for (int64_t t = t_begin, turn = 0; t < t_end; t += block_tiles, turn ^= block_tiles) {
        const int64_t count = std::min(block_tiles, t_end - t);
        for (cpu::Ahead& ahead : s.tile.ahead) ahead.lines = 0;
        for (int64_t i = 0; i < count; ++i) {
          place_.locate(s.rows[turn + i], t + i, g, s.columns);
          if (fused_) fuse_rows(s.fused_rows[turn + i], s.rows[turn + i], hidden(t + i));
          if (h_.rank > 0 && (first || !keep)) compute_hidden(s, turn + i, g, hidden(t + i));
        }
        if constexpr (kInt)
          if (fused_) {
            const auto next = place_.fresh(t + count < t_end ? t + count : INT64_MAX, block_end - p == h_.panels);
            const int64_t pieces = (block_end - p) * count * 2 * h_.taps * (quads_ * kQuad / align_);
            s.tile.ahead[0] = {next.x, static_cast<int>(ceil_div(count * next.x_bytes / 64, pieces))};
            s.tile.ahead[1] = {next.y, static_cast<int>(ceil_div(count * next.y_bytes / 64, pieces))};
          }
        for (int64_t panel = p; panel < block_end; ++panel) {
          if (s.packed) expand_up(s, panel, 0);
          if constexpr (kFloat) multiply_floats(s, &s.rows[turn], count, panel, panel - p);
          for (int64_t i = 0; i < count; ++i)
            if (fused_)
              run_fused(s, s.fused[panel - p], turn + i);
            else
              multiply(s, s.rows[turn + i], panel, panel - p, hidden(t + i), s.products.get() + i * kMaxTileM * kLanes);
        }
      }
      flush(s);  // before its panels' scales are replaced
      group = g;
      p = block_end;
    }
  }
};

}  // namespace

template <typename X>
void run_tiles(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output) {
  Tiles<X>(layer, window, input, output).run();
}
template void run_tiles(const Layer&, const Window&, const LayerInput<float>&, const LayerOutput&);
template void run_tiles(const Layer&, const Window&, const LayerInput<uint8_t>&, const LayerOutput&);
template void run_tiles(const Layer&, const Window&, const LayerInput<cpu::Bf16>&, const LayerOutput&);

}  // namespace cora
