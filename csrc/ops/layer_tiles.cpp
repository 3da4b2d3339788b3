// The packed matrix product: y [M, N] = X W^T + U B^T + bias, U = X A^T, M output positions.
//
// Pass 1 (run_hidden): U, and for int8 input the sums of each position's codes. Pass 2: tasks of a
// block of weight panels by a range of positions; a task unpacks its panels once (they stay in L2) and
// runs all its positions over them. Few positions: weights are unpacked row by row and dotted instead.
// Every sum runs over K in one order whatever the division of work, so thread counts agree bit for bit.
#include "ops/layer.h"

#include <cstring>
#include <type_traits>

namespace cora {

namespace {

using cpu::kDotM;
using cpu::kQuad;
using cpu::kTileM;
using cpu::kTileN;

constexpr int64_t kPanelBytes = 512 * 1024;  // panels of a task: half of the smallest common L2
constexpr int64_t kDotRows = 2 * kDotM;      // up to here unpacking costs more than multiplying
constexpr int64_t kMergeRun = 16;            // channels below which a kernel row is one run

/// How K is walked: taps runs of `run` elements, `segments` scale groups of run / segments each.
struct Walk {
  enum Order {
    kDirect,    // tap by tap, channels contiguous: the input is read in place
    kMerged,    // few channels: kernel row by kernel row, (column, channel) contiguous
    kGathered,  // scale groups that cut through a channel's taps: natural order, copied tile by tile
  } order;
  int64_t taps, run, segments;
  std::vector<int64_t> tap_offset;

  int64_t segment_run() const { return run / segments; }
  int64_t segment_s8() const { return taps * ((segment_run() + kQuad - 1) / kQuad * kQuad) * kTileN; }
  int64_t segment_f32() const { return taps * segment_run() * kTileN; }
};

template <typename T>
Walk plan_walk(const LayerWeights& w, const Window& win, const LayerInput<T>& in) {
  const int64_t taps = win.taps(), cg = win.group_channels();
  Walk walk{Walk::kDirect, taps, cg, w.q.groups, {}};
  if (w.q.groups > 1 && w.q.group_size % taps != 0) {
    walk = {Walk::kGathered, 1, w.k, w.q.groups, {0}};
    return walk;
  }
  if (w.q.groups == 1 && win.groups == 1 && win.dilation[1] == 1 && win.kernel[1] > 1 && cg <= kMergeRun) {
    walk = {Walk::kMerged, win.kernel[0], win.kernel[1] * cg, 1, {}};
    for (int64_t y = 0; y < win.kernel[0]; ++y) walk.tap_offset.push_back(y * win.dilation[0] * in.line);
    return walk;
  }
  for (int64_t y = 0; y < win.kernel[0]; ++y)
    for (int64_t x = 0; x < win.kernel[1]; ++x)
      walk.tap_offset.push_back(y * win.dilation[0] * in.line + x * win.dilation[1] * in.pixel);
  return walk;
}

/// Natural order (channel, ky, kx) of one row -> (ky; kx, channel) as interleave's code c * taps + t.
template <typename V>
void merge_order(const Window& win, const V* natural, V* merged) {
  const int64_t kh = win.kernel[0], kw = win.kernel[1], cg = win.group_channels();
  for (int64_t c = 0; c < cg; ++c)
    for (int64_t y = 0; y < kh; ++y)
      for (int64_t x = 0; x < kw; ++x) merged[(x * cg + c) * kh + y] = natural[(c * kh + y) * kw + x];
}

template <typename T>
class Tiles {
 public:
  static constexpr bool kInt = std::is_same_v<T, int8_t>;
  using Panel = std::conditional_t<kInt, uint8_t, float>;

  Tiles(const LayerWeights& weights, const Window& window, const LayerInput<T>& input, float* y)
      : w(weights),
        win(window),
        in(input),
        walk(plan_walk(weights, window, input)),
        y_(y),
        narrow_(!kInt || fits_int32(weights, weights.q.group_size)) {}

  void run() {
    if (w.rank > 0 || kInt) run_hidden();
    const bool linear = win.pixels() == 1 && win.taps() == 1 && win.groups == 1;
    if (linear && win.rows() <= kDotRows)
      run_dots();
    else
      run_blocks();
  }

 private:
  const LayerWeights& w;
  const Window& win;
  const LayerInput<T>& in;
  const Walk walk;
  float* const y_;
  const bool narrow_;     // integer sums of weight groups fit int32
  Buffer<float> hidden_;  // U [M, groups * rank]
  Buffer<int32_t> xsum_;  // [M, groups, segments]: sum of x - zx

  int64_t group_n() const { return w.n / win.groups; }
  int64_t panels_per_group() const { return (group_n() + kTileN - 1) / kTileN; }
  int64_t segment_size() const { return kInt ? walk.segment_s8() : walk.segment_f32(); }

  /// The rows of one tile as the kernels take them, for one group of channels.
  struct Rows {
    std::vector<const T*> whole, segment;  // [taps][kTileM]
    Buffer<T> copy;                        // kGathered only
  };
  Rows make_rows() const {
    Rows rows;
    rows.whole.resize(walk.taps * kTileM);
    rows.segment.resize(walk.taps * kTileM);
    if (walk.order == Walk::kGathered) rows.copy = Buffer<T>(kTileM * w.k);
    return rows;
  }
  void locate(Rows& rows, int64_t m0, int m, int64_t g) const {
    const int64_t cg = win.group_channels();
    for (int i = 0; i < m; ++i) {
      const T* base = in.x + in.offset(win, m0 + i) + g * cg;
      if (walk.order == Walk::kGathered) {
        T* to = rows.copy.get() + i * w.k;
        rows.whole[i] = to;
        for (int64_t c = 0; c < cg; ++c)
          for (int64_t ky = 0; ky < win.kernel[0]; ++ky)
            for (int64_t kx = 0; kx < win.kernel[1]; ++kx)
              *to++ = base[ky * win.dilation[0] * in.line + kx * win.dilation[1] * in.pixel + c];
        continue;
      }
      for (int64_t t = 0; t < walk.taps; ++t) rows.whole[t * kTileM + i] = base + walk.tap_offset[t];
    }
  }
  const T* const* segment(Rows& rows, int m, int64_t s) const {
    if (s == 0) return rows.whole.data();
    for (int64_t t = 0; t < walk.taps; ++t)
      for (int i = 0; i < m; ++i) rows.segment[t * kTileM + i] = rows.whole[t * kTileM + i] + s * walk.segment_run();
    return rows.segment.data();
  }

  /// Input zero-points and scales of a tile's rows.
  struct InputScale {
    float sx[kTileM];
    int32_t zx[kTileM];
  };
  InputScale input_scale(int64_t m0, int m) const {
    InputScale s{};
    if constexpr (kInt)
      for (int i = 0; i < m; ++i) {
        const int64_t image = (m0 + i) / win.pixels();
        s.sx[i] = in.scale[image];
        s.zx[i] = in.zero[image];
      }
    return s;
  }

  /// Natural-order codes [lanes][w.k] of a panel -> integer panels, a segment each.
  void interleave(Buffer<uint8_t>& codes, int lanes, int64_t segments, uint8_t* panel) const {
    if (walk.order == Walk::kMerged) {
      std::vector<uint8_t> merged(static_cast<size_t>(w.k));
      for (int lane = 0; lane < lanes; ++lane) {
        merge_order(win, codes.get() + lane * w.k, merged.data());
        std::memcpy(codes.get() + lane * w.k, merged.data(), merged.size());
      }
    }
    const auto kernel = cpu::k_interleave();
    const int64_t run = walk.run / segments, padded = (run + kQuad - 1) / kQuad * kQuad;
    for (int64_t s = 0; s < segments; ++s)
      kernel(codes.get() + s * run * walk.taps, w.k, lanes, walk.taps, run, panel + s * walk.taps * padded * kTileN);
  }

  /// One panel of 32 weight rows, all segments, with what its epilogue needs.
  struct PanelInfo {
    int lanes;
    Buffer<float> scale, b, bias;      // scale [segments][32], b [rank][32], bias [32]
    Buffer<int32_t> zero_point, wsum;  // [segments][32]
  };
  PanelInfo make_panel(int64_t first, int64_t group_end, Buffer<uint8_t>& codes, Buffer<uint8_t>& bytes,
                       Panel* panel) const {
    PanelInfo info;
    const int64_t segments = walk.segments;
    info.lanes = static_cast<int>(std::min<int64_t>(kTileN, group_end - first));
    info.scale = Buffer<float>(segments * kTileN);
    info.zero_point = Buffer<int32_t>(segments * kTileN);
    const auto unpack = cpu::k_unpack_row();
    for (int lane = 0; lane < kTileN; ++lane) {
      const bool exists = lane < info.lanes;
      if (exists) unpack(w.packed + (first + lane) * w.row_stride, w.k, w.bits, codes.get() + lane * w.k);
      const int64_t at = exists ? w.first_scale(first + lane) : 0;
      for (int64_t s = 0; s < segments; ++s) {
        info.scale[s * kTileN + lane] = exists ? w.scale[at + s] : 0.0f;
        info.zero_point[s * kTileN + lane] = exists ? w.zero_point[at + s] : 0;
      }
    }
    if constexpr (kInt) {
      interleave(codes, info.lanes, segments, panel);
      info.wsum = sum_codes(panel, segments);
    } else {
      interleave(codes, info.lanes, segments, bytes.get());
      for (int64_t s = 0; s < segments; ++s)
        cpu::k_panel_f32()(bytes.get() + s * walk.segment_s8(), &info.scale[s * kTileN], &info.zero_point[s * kTileN],
                           walk.taps, walk.segment_run(), panel + s * walk.segment_f32());
    }
    if (w.rank > 0) {
      info.b = Buffer<float>(w.rank * kTileN);
      cpu::k_transpose()(w.b + first * w.rank, w.rank, info.lanes, w.rank, info.b.get(), kTileN);
    }
    if (w.bias != nullptr) {
      info.bias = Buffer<float>(kTileN);
      std::fill_n(std::copy_n(w.bias + first, info.lanes, info.bias.get()), kTileN - info.lanes, 0.0f);
    }
    return info;
  }

  /// Sums of each lane's codes by segment: the product with an input of ones.
  Buffer<int32_t> sum_codes(const uint8_t* panel, int64_t segments) const {
    const int64_t run = walk.run / segments, padded = (run + kQuad - 1) / kQuad * kQuad;
    std::vector<int8_t> ones(static_cast<size_t>(padded), 1);
    std::vector<const int8_t*> rows(static_cast<size_t>(walk.taps * kTileM), ones.data());
    Buffer<int32_t> sums(segments * kTileN);
    std::fill_n(sums.get(), segments * kTileN, 0);
    for (int64_t s = 0; s < segments; ++s)
      cpu::k_tile_s8()(rows.data(), walk.taps, run, panel + s * walk.taps * padded * kTileN, 1, kTileN,
                       &sums[s * kTileN]);
    return sums;
  }

  /// c [m, 32] += one segment's integers as floats.
  void requantize(const int32_t* acc, int m, const int32_t* zx, const int32_t* wsum, const int32_t* zw,
                  const int32_t* xsum, const float* scale, float* c) const {
    if (narrow_) return cpu::k_requantize()(acc, m, zx, wsum, zw, xsum, scale, c);
    for (int i = 0; i < m; ++i)  // far zero-points: the same in 64 bits
      for (int n = 0; n < kTileN; ++n) {
        const int64_t sum = acc[i * kTileN + n] - int64_t{zx[i]} * wsum[n] - int64_t{zw[n]} * xsum[i];
        c[i * kTileN + n] += static_cast<float>(sum) * scale[n];
      }
  }

  void tile(Rows& rows, int64_t m0, int m, int64_t g, const PanelInfo& info, const Panel* panel, float* c,
            const InputScale& input) const {
    std::fill_n(c, m * kTileN, 0.0f);
    for (int64_t s = 0; s < walk.segments; ++s) {
      const T* const* part = segment(rows, m, s);
      if constexpr (kInt) {
        alignas(64) int32_t acc[kTileM * kTileN] = {};
        int32_t xsum[kTileM];
        for (int i = 0; i < m; ++i) xsum[i] = xsum_[((m0 + i) * win.groups + g) * walk.segments + s];
        cpu::k_tile_s8()(part, walk.taps, walk.segment_run(), panel + s * segment_size(), m, info.lanes, acc);
        requantize(acc, m, input.zx, &info.wsum[s * kTileN], &info.zero_point[s * kTileN], xsum,
                   &info.scale[s * kTileN], c);
      } else if (walk.taps == 1) {  // segments follow each other in K and in the panel
        cpu::k_tile_f32()(part, 1, walk.run, panel, m, info.lanes, c);
        return;
      } else {
        cpu::k_tile_f32()(part, walk.taps, walk.segment_run(), panel + s * segment_size(), m, info.lanes, c);
      }
    }
  }

  void finish(int64_t m0, int m, int64_t g, int64_t first, const PanelInfo& info, const float* c,
              const InputScale& input) const {
    const int64_t ldu = win.groups * w.rank;
    cpu::k_finish()(c, m, info.lanes, kInt ? input.sx : nullptr,
                    w.rank > 0 ? hidden_.get() + m0 * ldu + g * w.rank : nullptr, ldu, info.b.get(), w.rank,
                    info.bias.get(), y_ + m0 * w.n + first, w.n);
  }

  // --- Pass 1 ------------------------------------------------------------------------------------

  void run_hidden() {
    const int64_t rows = win.rows(), ldu = win.groups * w.rank;
    const int64_t panels = (w.rank + kTileN - 1) / kTileN;  // of A, per group
    const bool codes = w.a_codes != nullptr;
    const int64_t size = walk.taps * ((walk.run + kQuad - 1) / kQuad * kQuad) * kTileN;
    // A as panels: integers beside int8 input, else floats.
    Buffer<uint8_t> a_bytes(codes ? win.groups * panels * size : 0);
    Buffer<float> a_floats(w.rank > 0 && !(kInt && codes) ? win.groups * panels * size : 0);
    std::vector<Buffer<int32_t>> a_sums(static_cast<size_t>(win.groups * panels));
    parallel_for(win.groups * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p / panels * w.rank + p % panels * kTileN;
        const int lanes = static_cast<int>(std::min<int64_t>(kTileN, w.rank - p % panels * kTileN));
        if (!codes) {
          float_panel(first, lanes, &a_floats[p * size]);
          continue;
        }
        Buffer<uint8_t> natural(lanes * w.k);
        for (int64_t i = 0; i < lanes * w.k; ++i) natural[i] = static_cast<uint8_t>(w.a_codes[first * w.k + i] + 128);
        interleave(natural, lanes, 1, &a_bytes[p * size]);
        if constexpr (kInt) {
          a_sums[p] = sum_codes(&a_bytes[p * size], 1);
        } else {
          float scale[kTileN] = {};
          int32_t zero[kTileN] = {};
          std::copy_n(w.a_scale + first, lanes, scale);
          std::fill_n(zero, lanes, 128);
          cpu::k_panel_f32()(&a_bytes[p * size], scale, zero, walk.taps, walk.run, &a_floats[p * size]);
        }
      }
    });

    hidden_ = Buffer<float>(rows * ldu);
    if constexpr (kInt) xsum_ = Buffer<int32_t>(rows * win.groups * walk.segments);
    const int64_t tiles = (rows + kTileM - 1) / kTileM;
    const int64_t work = w.k * win.groups * (1 + w.rank);  // a position's
    parallel_for(tiles, std::max<int64_t>(1, 32768 / (work * kTileM)), [&](int64_t begin, int64_t end) {
      Rows tile_rows = make_rows();
      Buffer<float> real(kInt && w.rank > 0 && !codes ? kTileM * w.k : 0);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t m0 = t * kTileM;
        const int m = static_cast<int>(std::min<int64_t>(kTileM, rows - m0));
        const InputScale input = input_scale(m0, m);
        for (int64_t g = 0; g < win.groups; ++g) {
          locate(tile_rows, m0, m, g);
          int32_t total[kTileM] = {};
          if constexpr (kInt) sum_inputs(tile_rows, m0, m, g, input, total);
          for (int64_t p = 0; p < panels; ++p) {
            const int64_t index = g * panels + p, first = g * w.rank + p * kTileN;
            const int lanes = static_cast<int>(std::min<int64_t>(kTileN, w.rank - p * kTileN));
            alignas(64) float c[kTileM * kTileN] = {};
            if constexpr (kInt) {
              if (codes) {
                alignas(64) int32_t acc[kTileM * kTileN] = {};
                float scale[kTileN] = {};
                int32_t zero[kTileN];
                std::copy_n(w.a_scale + first, lanes, scale);
                std::fill_n(zero, kTileN, 128);
                cpu::k_tile_s8()(tile_rows.whole.data(), walk.taps, walk.run, &a_bytes[index * size], m, lanes, acc);
                cpu::k_requantize()(acc, m, input.zx, a_sums[index].get(), zero, total, scale, c);
              } else {
                hidden_from_floats(tile_rows, m, input, real, &a_floats[index * size], lanes, c);
              }
            } else {
              cpu::k_tile_f32()(tile_rows.whole.data(), walk.taps, walk.run, &a_floats[index * size], m, lanes, c);
            }
            cpu::k_finish()(c, m, lanes, kInt ? input.sx : nullptr, nullptr, 0, nullptr, 0, nullptr,
                            hidden_.get() + m0 * ldu + first, ldu);
          }
        }
      }
    });
  }

  /// A float adapter's panel: out[t][c][lane] = a[lane][c * taps + t].
  void float_panel(int64_t first, int lanes, float* out) const {
    std::vector<float> merged(static_cast<size_t>(w.k));
    std::fill_n(out, walk.taps * walk.run * kTileN, 0.0f);
    for (int lane = 0; lane < lanes; ++lane) {
      const float* row = w.a_float + (first + lane) * w.k;
      if (walk.order == Walk::kMerged) {
        merge_order(win, row, merged.data());
        row = merged.data();
      }
      for (int64_t t = 0; t < walk.taps; ++t)
        for (int64_t c = 0; c < walk.run; ++c) out[(t * walk.run + c) * kTileN + lane] = row[c * walk.taps + t];
    }
  }

  void sum_inputs(Rows& rows, int64_t m0, int m, int64_t g, const InputScale& input, int32_t* total) {
    for (int64_t s = 0; s < walk.segments; ++s) {
      int32_t sums[kTileM];
      cpu::k_row_sums()(segment(rows, m, s), walk.taps, walk.segment_run(), m, sums);
      for (int i = 0; i < m; ++i) {
        const int32_t sum = sums[i] - input.zx[i] * static_cast<int32_t>(walk.taps * walk.segment_run());
        xsum_[((m0 + i) * win.groups + g) * walk.segments + s] = sum;
        total[i] += sum;
      }
    }
  }

  /// Quantised input, float adapter: x - zx as floats, exact, then the float tile.
  void hidden_from_floats(const Rows& rows, int m, const InputScale& input, Buffer<float>& real, const float* panel,
                          int lanes, float* c) const {
    const float* pointers[kTileM];
    for (int i = 0; i < m; ++i) {
      float* to = real.get() + i * w.k;
      pointers[i] = to;
      for (int64_t t = 0; t < walk.taps; ++t)
        for (int64_t k = 0; k < walk.run; ++k)
          *to++ = static_cast<float>(static_cast<int32_t>(rows.whole[t * kTileM + i][k]) - input.zx[i]);
    }
    cpu::k_tile_f32()(pointers, 1, w.k, panel, m, lanes, c);
  }

  // --- Pass 2 ------------------------------------------------------------------------------------

  void run_blocks() {
    const int64_t rows = win.rows(), tiles = (rows + kTileM - 1) / kTileM;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t panel_size = walk.segments * segment_size();
    const int64_t fit = std::max<int64_t>(1, kPanelBytes / (panel_size * static_cast<int64_t>(sizeof(Panel))));
    const int64_t share = (panels_per_group() * win.groups + threads - 1) / threads;
    const int64_t per_block = std::min({fit, share, panels_per_group()});
    const int64_t blocks = (panels_per_group() + per_block - 1) / per_block * win.groups;
    // Blocks that do not divide evenly over the threads are also cut by rows, not below 8 tiles.
    const bool even = blocks % threads == 0 || blocks >= 8 * threads;
    const int64_t cuts =
        even ? 1 : std::clamp<int64_t>((4 * threads + blocks - 1) / blocks, 1, std::max<int64_t>(1, tiles / 8));
    parallel_for(blocks * cuts, 1, [&](int64_t begin, int64_t end) {
      Rows tile_rows = make_rows();
      Buffer<uint8_t> codes(kTileN * w.k), bytes(kInt ? 0 : walk.segments * walk.segment_s8());
      Buffer<Panel> panels(per_block * panel_size);
      std::vector<PanelInfo> infos;
      int64_t built = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / cuts, cut = task % cuts;
        const int64_t blocks_per_group = blocks / win.groups;
        const int64_t g = block / blocks_per_group, group_end = (g + 1) * group_n();
        const int64_t start = g * group_n() + block % blocks_per_group * per_block * kTileN;
        if (block != built) {
          infos.clear();
          for (int64_t n = start; n < group_end && n < start + per_block * kTileN; n += kTileN)
            infos.push_back(
                make_panel(n, group_end, codes, bytes, &panels[static_cast<int64_t>(infos.size()) * panel_size]));
          built = block;
        }
        for (int64_t t = tiles * cut / cuts; t < tiles * (cut + 1) / cuts; ++t) {
          const int64_t m0 = t * kTileM;
          const int m = static_cast<int>(std::min<int64_t>(kTileM, rows - m0));
          const InputScale input = input_scale(m0, m);
          locate(tile_rows, m0, m, g);
          for (size_t p = 0; p < infos.size(); ++p) {
            alignas(64) float c[kTileM * kTileN];
            tile(tile_rows, m0, m, g, infos[p], &panels[static_cast<int64_t>(p) * panel_size], c, input);
            finish(m0, m, g, start + static_cast<int64_t>(p) * kTileN, infos[p], c, input);
          }
        }
      }
    });
  }

  /// A linear layer of few rows: each weight row is unpacked once and dotted with all of x.
  void run_dots() {
    const int64_t rows = win.rows(), blocks = (w.n + kTileN - 1) / kTileN;
    parallel_for(blocks, std::max<int64_t>(1, 16384 / (w.k * kTileN)), [&](int64_t begin, int64_t end) {
      Buffer<uint8_t> codes(w.k);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kTileN;
        const int lanes = static_cast<int>(std::min<int64_t>(kTileN, w.n - first));
        alignas(64) float c[kDotRows * kTileN] = {};
        for (int lane = 0; lane < lanes; ++lane) {
          cpu::k_unpack_row()(w.packed + (first + lane) * w.row_stride, w.k, w.bits, codes.get());
          for (int64_t m0 = 0; m0 < rows; m0 += kDotM)
            dot_row(codes.get(), w.first_scale(first + lane), m0, static_cast<int>(std::min<int64_t>(kDotM, rows - m0)),
                    c + m0 * kTileN + lane);
        }
        Buffer<float> b(w.rank * kTileN), bias(w.bias != nullptr ? kTileN : 0);
        cpu::k_transpose()(w.b + first * w.rank, w.rank, lanes, w.rank, b.get(), kTileN);
        if (w.bias != nullptr) std::copy_n(w.bias + first, lanes, bias.get());
        cpu::k_finish()(c, static_cast<int>(rows), lanes, kInt ? in.scale.get() : nullptr, hidden_.get(), w.rank,
                        b.get(), w.rank, w.bias != nullptr ? bias.get() : nullptr, y_ + first, w.n);
      }
    });
  }

  void dot_row(const uint8_t* codes, int64_t scale_at, int64_t m0, int m, float* c) const {
    const int64_t size = w.q.group_size;
    for (int64_t s = 0; s < w.q.groups; ++s) {
      const float scale = w.scale[scale_at + s];
      const int32_t zero = w.zero_point[scale_at + s];
      const T* x = in.x + m0 * w.k + s * size;
      if constexpr (kInt) {
        int32_t out[kDotM + 1];
        cpu::k_dot_s8()(codes + s * size, x, w.k, m, size, out);
        for (int i = 0; i < m; ++i) {
          const int64_t sum =
              out[i] - int64_t{in.zero[m0 + i]} * out[m] - int64_t{zero} * xsum_[(m0 + i) * w.q.groups + s];
          c[i * kTileN] += static_cast<float>(sum) * scale;
        }
      } else {
        float out[kDotM];
        cpu::k_dot_f32()(codes + s * size, static_cast<float>(zero), x, w.k, m, size, out);
        for (int i = 0; i < m; ++i) c[i * kTileN] += out[i] * scale;
      }
    }
  }
};

}  // namespace

template <typename T>
void run_tiles(const LayerWeights& weights, const Window& window, const LayerInput<T>& input, float* y) {
  Tiles<T>(weights, window, input, y).run();
}
template void run_tiles(const LayerWeights&, const Window&, const LayerInput<float>&, float*);
template void run_tiles(const LayerWeights&, const Window&, const LayerInput<int8_t>&, float*);

}  // namespace cora
