// The packed matrix product by tiles: output positions by panels of 32 output channels.
//
// A task is a range of position tiles by a range of panels. It takes as many panels as its share of L2
// holds, expands their weights there once, and runs all its tiles over them: the adapter's hidden
// values first (A's rows are panels like the weight's), then panel by panel the product, the adapter's
// second half and the epilogue, while the tile is in L1. Nothing is exchanged between tasks, and every
// sum runs over K in one order, so thread counts agree bit for bit.
#include "ops/layer.h"

#include <cstring>
#include <type_traits>

namespace cora {

namespace {

using cpu::Isa;
using cpu::kHiddenChunk;
using cpu::kLanes;
using cpu::kMaxTileM;
using cpu::kQuad;
using cpu::kQuadRow;

constexpr int64_t kPanelBytes = 512 * 1024;  // expanded panels of a task: half of the smallest common L2

/// Output positions in the order tiles take them.
struct Grid {
  // Positions of an image run over lines of `columns`: its width, or the padded input's width, so that
  // neighbours are one distance apart in memory all over the image (the surplus is computed and dropped).
  int64_t columns, per_image, images, tiles_per_image, tiles;
};

template <typename X>
class Tiles {
 public:
  static constexpr bool kInt = std::is_same_v<X, uint8_t>;
  using Panel = std::conditional_t<kInt, int8_t, float>;

  Tiles(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output)
      : layer_(layer),
        h_(*layer.h),
        win_(window),
        in_(input),
        out_(output),
        isa_(kInt ? cpu::active_isa() : std::min(cpu::active_isa(), Isa::kAvx512)),
        up_isa_(h_.adapter == AdapterKind::kInt8 ? isa_ : std::min(isa_, Isa::kAvx512)),
        shape_(cpu::tile_shape(isa_)),
        quads_(round_up(layer.segment_run(), shape_.align) / kQuad),
        a_quads_(round_up(h_.run, shape_.align) / kQuad),
        gathered_run_(h_.walk == Walk::kNatural ? h_.run : round_up(h_.run, shape_.align)),
        tap_(tap_offsets()),
        gathered_tap_(static_cast<size_t>(h_.taps)) {
    for (int64_t t = 0; t < h_.taps; ++t) gathered_tap_[t] = t * gathered_run_;
    grid_ = plan_grid();
  }

  void run() const {
    const int64_t threads = torch::stable::get_num_threads(), panels = h_.groups * h_.panels;
    // The split that leaves the slowest thread least: expanding a panel costs about one tile of it.
    int64_t n_parts = 1, best = INT64_MAX;
    for (int64_t parts = 1; parts <= std::min(threads, panels); ++parts) {
      const int64_t tiles = ceil_div(grid_.tiles, threads / parts), share = ceil_div(panels, parts);
      const int64_t cost = share * (tiles + 1) + tiles * h_.chunks * ceil_div(share, h_.panels);
      if (cost < best) {
        best = cost;
        n_parts = parts;
      }
    }
    const int64_t m_parts = std::clamp<int64_t>(threads / n_parts, 1, grid_.tiles);
    const int64_t work = h_.n / h_.groups * h_.taps * h_.run * win_.rows();  // multiplications
    parallel_for(n_parts * m_parts, work < 100000 ? n_parts * m_parts : 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / m_parts, m = task % m_parts;
        run_task(panels * n / n_parts, panels * (n + 1) / n_parts, grid_.tiles * m / m_parts,
                 grid_.tiles * (m + 1) / m_parts);
      }
    });
  }

 private:
  const Layer& layer_;
  const LayerHeader& h_;
  const Window& win_;
  const LayerInput<X>& in_;
  const LayerOutput& out_;
  const Isa isa_, up_isa_;
  const cpu::TileShape shape_;
  const int64_t quads_, a_quads_;  // of a run, padded as the level wants it
  const int64_t gathered_run_;
  const std::vector<int64_t> tap_;
  std::vector<int64_t> gathered_tap_;
  Grid grid_;

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

  std::vector<int64_t> tap_offsets() const {
    std::vector<int64_t> offsets;
    for (int64_t y = 0; y < h_.kernel[0]; ++y)
      for (int64_t x = 0; x < (h_.walk == Walk::kLines ? 1 : h_.kernel[1]); ++x)
        offsets.push_back(y * h_.dilation[0] * in_.line + x * h_.dilation[1] * in_.pixel);
    return offsets;
  }

  Grid plan_grid() const {
    const auto grid = [&](int64_t columns, bool across) {
      Grid g{columns, (win_.out(0) - 1) * columns + win_.out(1), win_.batch, 0, 0};
      g.tiles_per_image = across ? 0 : ceil_div(g.per_image, shape_.m);
      g.tiles = across ? ceil_div(g.per_image * g.images, shape_.m) : g.tiles_per_image * g.images;
      return g;
    };
    const Grid plain = grid(win_.out(1), true);
    const int64_t columns = in_.line / in_.pixel;
    const bool dense = h_.stride[0] == 1 && h_.stride[1] == 1;
    if (!shape_.equidistant || !dense || h_.walk == Walk::kNatural || (columns == win_.out(1) && is_one_run()))
      return plain;
    // Surplus positions against copies of the tiles that cross a line (about 1/32 of a panel's product).
    const Grid wide = grid(columns, false);
    const int64_t panels = h_.panels * h_.groups;
    return wide.tiles * panels * 32 <= plain.tiles * (panels * 32 + 32) ? wide : plain;
  }
  /// Positions lie at one distance all over the batch.
  bool is_one_run() const { return in_.image == win_.out(0) * in_.line; }

  struct Position {
    int64_t image, y, x;
  };

  /// One tile's rows, for the kernels.
  struct Rows {
    int m = 0;
    const X* row[kMaxTileM];
    const X* segment[kMaxTileM];
    const int64_t* tap;
    int64_t at[kMaxTileM], add_at[kMaxTileM];
    float sx[kMaxTileM];
    int32_t zx[kMaxTileM];
    Buffer<X> copy;
  };

  void locate(Rows& rows, int64_t tile) const {
    const bool across = grid_.tiles_per_image == 0;
    const int64_t total = across ? grid_.per_image * grid_.images : grid_.per_image;
    const int64_t first = (across ? tile : tile % grid_.tiles_per_image) * shape_.m;
    rows.m = static_cast<int>(std::min<int64_t>(shape_.m, total - first));
    Position p{across ? first / grid_.per_image : tile / grid_.tiles_per_image,
               first % grid_.per_image / grid_.columns, first % grid_.per_image % grid_.columns};
    for (int i = 0; i < rows.m; ++i) {
      const bool real = p.x < win_.out(1);
      rows.row[i] = in_.x + p.image * in_.image + p.y * h_.stride[0] * in_.line + p.x * h_.stride[1] * in_.pixel;
      rows.at[i] = real ? p.image * out_.image + p.y * out_.line + p.x * out_.pixel : -1;
      if (out_.epilogue.add != nullptr)
        rows.add_at[i] = p.image * out_.add_image + p.y * out_.add_line + p.x * out_.add_pixel;
      if constexpr (kInt) {
        rows.sx[i] = in_.scale[p.image];
        rows.zx[i] = in_.zero[p.image];
      }
      if (++p.x == grid_.columns) {
        p.x = 0;
        if (++p.y == win_.out(0)) {
          p.y = 0;
          ++p.image;
        }
      }
    }
    rows.tap = tap_.data();
  }

  /// A group's channels of the tile's rows, copied where the kernels cannot take them in place.
  void select_group(Rows& rows, int64_t g, int64_t previous) const {
    const int64_t step = (g - previous) * layer_.group_channels();
    const int whole = shape_.equidistant ? (rows.m + 15) / 16 * 16 : rows.m;
    for (int i = 0; i < rows.m; ++i) rows.row[i] += step;
    if (h_.walk == Walk::kNatural) {
      copy_rows(rows, [&](const X* from, X* to) {
        for (int64_t c = 0; c < layer_.group_channels(); ++c)
          for (int64_t ky = 0; ky < h_.kernel[0]; ++ky)
            for (int64_t kx = 0; kx < h_.kernel[1]; ++kx)
              *to++ = from[ky * h_.dilation[0] * in_.line + kx * h_.dilation[1] * in_.pixel + c];
      });
    } else if (shape_.equidistant && !equidistant(rows, whole)) {
      copy_rows(rows, [&](const X* from, X* to) {
        for (int64_t t = 0; t < h_.taps; ++t, to += gathered_run_)
          std::memcpy(to, from + tap_[t], static_cast<size_t>(h_.run) * sizeof(X));
      });
    }
    const int64_t distance = rows.m > 1 ? rows.row[1] - rows.row[0] : 0;
    for (int i = rows.m; i < whole; ++i) rows.row[i] = rows.row[i - 1] + distance;
  }
  template <typename Copy>
  void copy_rows(Rows& rows, const Copy& copy) const {
    const int64_t size = h_.taps * gathered_run_;
    if (rows.copy.get() == nullptr) rows.copy = Buffer<X>(kMaxTileM * size);
    for (int i = 0; i < rows.m; ++i) {
      copy(rows.row[i], rows.copy.get() + i * size);
      rows.row[i] = rows.copy.get() + i * size;
    }
    rows.tap = gathered_tap_.data();
  }
  bool equidistant(const Rows& rows, int whole) const {
    if (rows.m < whole && !in_.slack) return false;  // the kernels read whole blocks of rows
    if (rows.m == 1) return false;
    for (int i = 0; i < rows.m; i += 16)
      for (int j = i + 1; j < std::min(rows.m, i + 16); ++j)
        if (rows.row[j] - rows.row[j - 1] != rows.row[1] - rows.row[0]) return false;
    return true;
  }

  const X* const* segment(Rows& rows, int64_t s) const {
    if (s == 0) return rows.row;
    const int whole = shape_.equidistant ? (rows.m + 15) / 16 * 16 : rows.m;
    for (int i = 0; i < whole; ++i) rows.segment[i] = rows.row[i] + s * layer_.segment_run();
    return rows.segment;
  }

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

  int64_t segment_size() const {  // of an expanded panel, elements
    return h_.taps * (kInt ? quads_ * kQuadRow : layer_.segment_run() * kLanes);
  }
  int64_t chunk_size() const { return h_.taps * (kInt ? a_quads_ * kQuadRow : h_.run * kLanes); }

  /// What a task keeps of its panels and its group's adapter.
  struct Scratch {
    Rows rows;
    Buffer<Panel> panels, chunks;
    Buffer<int8_t> bytes;
    Buffer<float> up_weights, a_scale;     // B as the level multiplies it; [chunks][32]
    Buffer<float> alpha;                   // [panels][32]: weight scale times x's
    Buffer<int32_t> correction, a_offset;  // [panels][32]: zx times the weights' sum
    Buffer<float> hidden, real;            // [tiles][chunks][kHiddenChunk]
  };

  void expand_panel(Scratch& s, int64_t p, int64_t index) const {
    static constexpr int32_t kNear[kLanes] = {};
    for (int64_t seg = 0; seg < h_.segments; ++seg) {
      Panel* panel = s.panels.get() + (index * h_.segments + seg) * segment_size();
      if constexpr (kInt)
        expand(layer_.codes(p, seg), h_.bits, layer_.quads(), quads_, layer_.offset(p, seg), panel);
      else
        expand_f32(layer_.codes(p, seg), h_.bits, layer_.segment_run(), layer_.offset(p, seg), layer_.scale(p, seg),
                   h_.far ? layer_.far(p, seg) : kNear, s.bytes.get(), panel);
    }
    if (h_.adapter == AdapterKind::kInt8)
      cpu::k_expand_up.at(up_isa_)(layer_.b<int8_t>(p), h_.rank, s.up_weights.get() + index * h_.chunks * kHiddenChunk);
    if constexpr (kInt)
      for (int n = 0; n < kLanes; ++n) {
        s.alpha[index * kLanes + n] = layer_.scale(p, 0)[n] * in_.scale[0];
        s.correction[index * kLanes + n] = in_.zero[0] * layer_.wsum(p, 0)[n];
      }
  }

  void expand_chunks(Scratch& s, int64_t g) const {
    static constexpr int32_t kNear[kLanes] = {};
    uint8_t offset[kLanes];
    std::fill_n(offset, kLanes, uint8_t{128});
    for (int64_t q = 0; q < h_.chunks; ++q) {
      const int64_t at = g * h_.chunks + q;
      Panel* panel = s.chunks.get() + q * chunk_size();
      if (h_.adapter == AdapterKind::kFloat) {
        if constexpr (!kInt) std::memcpy(panel, layer_.a<float>(at), static_cast<size_t>(layer_.a_size()));
      } else if constexpr (kInt) {
        expand(layer_.a<uint8_t>(at), 8, layer_.a_quads(), a_quads_, offset, panel);
      } else {
        expand_f32(layer_.a<uint8_t>(at), 8, h_.run, offset, layer_.a_scale(at), kNear, s.bytes.get(), panel);
      }
    }
  }

  // --- One tile ----------------------------------------------------------------------------------

  static int lanes_of(int64_t count, int64_t first) { return static_cast<int>(std::min<int64_t>(kLanes, count - first)); }

  /// The adapter's hidden values of a tile, chunk by chunk.
  void compute_hidden(Scratch& s, int64_t g, float* hidden) const {
    static constexpr int32_t kZero[kMaxTileM] = {};
    Rows& rows = s.rows;
    for (int64_t q = 0; q < h_.chunks; ++q) {
      const int64_t at = g * h_.chunks + q;
      const int lanes = lanes_of(h_.rank, q * kLanes);
      alignas(64) float c[kMaxTileM * kLanes];
      if (!kInt || h_.adapter == AdapterKind::kFloat) std::fill_n(c, rows.m * kLanes, 0.0f);
      if constexpr (kInt) {
        if (h_.adapter == AdapterKind::kFloat) {
          hidden_from_floats(s, layer_.a<float>(at), lanes, c);
        } else {
          alignas(64) int32_t acc[kMaxTileM * kLanes];
          cpu::k_tile_s8.at(isa_)(rows.row, rows.tap, h_.taps, a_quads_, s.chunks.get() + q * chunk_size(), rows.m,
                                  lanes, acc);
          cpu::k_requantize.at(isa_)(acc, rows.m, rows.zx, layer_.a_sum(at), kZero, kZero, layer_.a_scale(at), false,
                                     c);
        }
        for (int i = 0; i < rows.m; ++i)
          for (int n = 0; n < kLanes; ++n) c[i * kLanes + n] *= rows.sx[i];
      } else {
        cpu::k_tile_f32.at(isa_)(rows.row, rows.tap, h_.taps, h_.run, s.chunks.get() + q * chunk_size(), rows.m, lanes,
                                 c);
      }
      cpu::k_store_hidden.at(up_isa_)(c, rows.m, hidden + q * kHiddenChunk);
    }
  }

  /// Quantised input, float adapter: x - zx as floats, exact, then the float tile.
  void hidden_from_floats(Scratch& s, const float* panel, int lanes, float* c) const {
    const Rows& rows = s.rows;
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

  void multiply(Scratch& s, int64_t p, int64_t index, const float* hidden) const {
    Rows& rows = s.rows;
    const int64_t first = p % h_.panels * kLanes;
    const int lanes = lanes_of(layer_.group_n(), first);
    const Panel* panel = s.panels.get() + index * h_.segments * segment_size();
    alignas(64) float c[kMaxTileM * kLanes], up[kMaxTileM * kLanes];
    alignas(64) int32_t acc[kMaxTileM * kLanes];
    cpu::Epilogue e = out_.epilogue;
    if constexpr (kInt) {
      const bool direct = h_.segments == 1 && !h_.far && in_.uniform;
      for (int64_t seg = 0; seg < h_.segments; ++seg) {
        cpu::k_tile_s8.at(isa_)(segment(rows, seg), rows.tap, h_.taps, quads_, panel + seg * segment_size(), rows.m,
                                lanes, acc);
        if (!direct) requantize(rows, p, seg, acc, c);
      }
      if (direct) {
        e.acc = acc;
        e.correction = s.correction.get() + index * kLanes;
        e.alpha = s.alpha.get() + index * kLanes;
      } else {
        e.c = c;
        e.row_scale = rows.sx;
      }
    } else {
      std::fill_n(c, rows.m * kLanes, 0.0f);
      for (int64_t seg = 0; seg < h_.segments; ++seg)
        cpu::k_tile_f32.at(isa_)(segment(rows, seg), rows.tap, h_.taps, layer_.segment_run(),
                                 panel + seg * segment_size(), rows.m, lanes, c);
      e.c = c;
    }
    if (h_.rank > 0) {
      const void* b = h_.adapter == AdapterKind::kInt8
                          ? static_cast<const void*>(s.up_weights.get() + index * h_.chunks * kHiddenChunk)
                          : layer_.b<float>(p);
      cpu::k_up_project.at(up_isa_)(hidden, rows.m, h_.rank, b, up);
      e.up = up;
    }
    e.bias = layer_.bias(p);
    const int64_t channel = p / h_.panels * layer_.group_n() + first;
    e.y = static_cast<char*>(e.y) + channel * (e.codes ? 1 : static_cast<int64_t>(sizeof(float)));
    if (e.add != nullptr)
      e.add = static_cast<const char*>(e.add) + channel * (e.add_codes ? 1 : static_cast<int64_t>(sizeof(float)));
    cpu::k_epilogue.at(isa_)(e, rows.m, lanes, rows.at, rows.add_at);
  }

  /// c (+)= a segment's exact integers times their scale.
  void requantize(Rows& rows, int64_t p, int64_t seg, const int32_t* acc, float* c) const {
    static constexpr int32_t kNear[kLanes] = {};
    int32_t xsum[kMaxTileM] = {};
    if (h_.far) {
      cpu::k_row_sums.at(isa_)(segment(rows, seg), rows.tap, h_.taps, layer_.segment_run(), rows.m, xsum);
      for (int i = 0; i < rows.m; ++i)
        xsum[i] -= rows.zx[i] * static_cast<int32_t>(h_.taps * layer_.segment_run());
    }
    const int32_t *wsum = layer_.wsum(p, seg), *far = h_.far ? layer_.far(p, seg) : kNear;
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
    const cpu::TileSession session(isa_);
    const int64_t panel_size = h_.segments * segment_size(), tiles = t_end - t_begin;
    const int64_t fit =
        std::max<int64_t>(1, kPanelBytes / (panel_size * static_cast<int64_t>(sizeof(Panel))));
    const int64_t block_panels = std::min({fit, p_end - p_begin, h_.panels});
    Scratch s;
    s.panels = Buffer<Panel>(block_panels * panel_size);
    s.alpha = Buffer<float>(kInt ? block_panels * kLanes : 0);
    s.correction = Buffer<int32_t>(kInt ? block_panels * kLanes : 0);
    if (!kInt) s.bytes = Buffer<int8_t>(h_.taps * (round_up(h_.run, kQuad)) * kLanes);
    if (h_.rank > 0) {
      s.chunks = Buffer<Panel>(h_.chunks * chunk_size());
      s.up_weights = Buffer<float>(h_.adapter == AdapterKind::kInt8 ? block_panels * h_.chunks * kHiddenChunk : 0);
      // Kept for the group's next block of panels, if there is one.
      const bool keep = block_panels < std::min(p_end - p_begin, h_.panels);
      s.hidden = Buffer<float>((keep ? tiles : 1) * h_.chunks * kHiddenChunk);
    }
    int64_t group = -1;
    for (int64_t p = p_begin; p < p_end;) {
      const int64_t g = p / h_.panels, group_end = std::min(p_end, (g + 1) * h_.panels);
      const int64_t block_end = std::min(group_end, p + block_panels);
      const bool first = g != group, keep = block_panels < std::min(p_end - p_begin, h_.panels);
      if (first && h_.rank > 0) expand_chunks(s, g);
      for (int64_t i = p; i < block_end; ++i) expand_panel(s, i, i - p);
      for (int64_t t = t_begin; t < t_end; ++t) {
        locate(s.rows, t);
        select_group(s.rows, g, 0);
        float* hidden = s.hidden.get() + (keep ? (t - t_begin) * h_.chunks * kHiddenChunk : 0);
        if (h_.rank > 0 && (first || !keep)) compute_hidden(s, g, hidden);
        for (int64_t i = p; i < block_end; ++i) multiply(s, i, i - p, hidden);
      }
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

}  // namespace cora
