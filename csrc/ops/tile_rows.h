// Which output positions make up a tile, and where their rows of x lie: in place where a level can take them so, copied
// together where it cannot; of few channels in the interleaved lines of an output row.
#pragma once

#include "ops/layer.h"

#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace cora {

/// Output positions in the order tiles take them: lines of `width`, each cut into `per_line` blocks of
/// `block` (the last one overlaps the one before it where that does not come out even).
struct Grid {
  enum Lines {
    kRows,    // a line is a row of the output
    kImages,  // an image, rows as wide as the padded input's, so that all is one distance apart in memory;
              // the surplus is computed and dropped
    kBatch,   // everything
  } lines;
  int64_t width, count, per_line, block, columns;
  bool copied;  // rows are not at one distance: they are copied together

  int64_t blocks() const { return count * per_line; }
};

// Rows that are listed at a time, whether all are wanted or not: a block's, of the level that has two to a tile.
constexpr int kListed = cpu::kMaxTileM / 2;

/// One tile's rows, for the kernels.
template <typename X>
struct Rows {
  int m = 0;
  const X* row[cpu::kMaxTileM];
  const X* segment[cpu::kMaxTileM];
  const int64_t* tap;
  int64_t plane;
  int64_t at[cpu::kMaxTileM + kListed], add_at[cpu::kMaxTileM + kListed];
  int count;  // listed: rows that are wanted, listed as cpu::CodesRows has them
  uint8_t from[cpu::kMaxTileM + kListed];
  float sx[cpu::kMaxTileM];
  int32_t zx[cpu::kMaxTileM];
  Buffer<X> copy;
};

/// The input lines that an output row's windows see, interleaved: [column][kernel row][channel]. Of the rows that a
/// task's tiles are at, in turns.
template <typename X>
struct Columns {
  Buffer<X> storage;
  std::vector<int64_t> row;  // whose columns a slot holds
};

/// Finds the rows of a layer's tiles.
template <typename X>
class TileRows {
 public:
  /// align: elements of K a run is padded to. scaled: rows say their input's scale and zero-point. listed: rows that
  /// are wanted are listed; only a block's first row is located where the others follow it at one distance. passes:
  /// times that a tile is located.
  TileRows(const Layer& layer, const Window& window, const LayerInput<X>& input, const LayerOutput& output,
           cpu::Isa isa, int64_t align, bool scaled, bool listed, int64_t passes)
      : layer_(layer),
        h_(*layer.h),
        win_(window),
        in_(input),
        out_(output),
        isa_(isa),
        shape_(cpu::tile_shape(isa)),
        scaled_(scaled),
        listed_(listed),
        gathered_run_(h_.walk == Walk::kNatural ? h_.run : round_up(h_.run, std::max<int64_t>(align, kInt ? 64 : 32))),
        tap_(tap_offsets()),
        gathered_tap_(static_cast<size_t>(h_.taps)),
        grid_(plan_grid(passes)),
        copies_(grid_.copied || h_.walk == Walk::kNatural),
        column_(h_.walk == Walk::kColumns ? h_.run / h_.kernel[1] : in_.pixel),
        columns_size_(
            round_up(((win_.out(1) - 1) * h_.stride[1] + h_.kernel[1]) * column_ + cpu::kInterleaveSlack, 64)) {
    for (int64_t t = 0; t < h_.taps; ++t) gathered_tap_[t] = t * gathered_run_;
  }

  int64_t tiles() const { return ceil_div(grid_.blocks(), shape_.blocks); }
  /// Rows of a block.
  int block() const { return static_cast<int>(grid_.block); }
  /// Between a block's rows, in elements, where the level wants one distance.
  int64_t row_stride() const { return copies_ ? h_.taps * gathered_run_ : h_.stride[1] * column_; }
  /// Elements that a tile brings to the cache, about.
  int64_t tile_elements() const {
    return shape_.block * shape_.blocks * (copies_ ? h_.taps * gathered_run_ : column_) * in_.planes;
  }

  /// Room for what `tiles` tiles at a time look at.
  Columns<X> columns(int64_t tiles) const {
    if (h_.walk != Walk::kColumns) return {};
    const int64_t slots = tiles * shape_.blocks, all = slots * in_.planes * columns_size_;
    Columns<X> c{Buffer<X>(all), std::vector<int64_t>(static_cast<size_t>(slots), -1)};
    // What is past a run is multiplied by zeros, so it must be finite.
    if (!kInt) std::memset(c.storage.get(), 0, static_cast<size_t>(all) * sizeof(X));
    return c;
  }
  /// A tile's rows, a group's channels of them, copied where the kernels cannot take them in place.
  void locate(Rows<X>& rows, int64_t tile, int64_t g, Columns<X>& columns) const {
    rows.m = rows.count = 0;
    rows.tap = tap_.data();
    rows.plane = h_.walk == Walk::kColumns ? columns_size_ : in_.plane;
    const X* const base = in_.x + g * layer_.group_channels();
    for (int64_t b = tile * shape_.blocks; b < std::min((tile + 1) * shape_.blocks, grid_.blocks()); ++b)
      locate_block(rows, b, base, columns);
    if (h_.walk == Walk::kNatural) {
      copy_rows(rows, [&](const X* from, X* to) {
        for (int64_t c = 0; c < layer_.group_channels(); ++c)
          for (int64_t ky = 0; ky < h_.kernel[0]; ++ky)
            for (int64_t kx = 0; kx < h_.kernel[1]; ++kx)
              *to++ = from[ky * h_.dilation[0] * in_.line + kx * h_.dilation[1] * in_.pixel + c];
      });
    } else if (grid_.copied) {
      copy_rows(rows, [&](const X* from, X* to) {
        for (int64_t t = 0; t < h_.taps; ++t, to += gathered_run_)
          std::memcpy(to, from + tap_[t], static_cast<size_t>(h_.run) * sizeof(X));
      });
    }
  }

  /// Memory that a tile is the first to touch and that may have left L2, or not been there: of x, and of what is added
  /// or else written.
  struct Fresh {
    const uint8_t *x, *y;
    int64_t x_bytes = 0, y_bytes = 0;
  };
  /// whole: all channels of it.
  Fresh fresh(int64_t tile, bool whole) const {
    constexpr int64_t kNear = 1024 * 1024;  // half of L2
    Fresh f{};
    const cpu::Epilogue& e = out_.epilogue;
    const bool add = e.add != nullptr;
    const int64_t y_size = (add ? e.add_codes : e.codes) ? 1 : 4, rows = shape_.blocks * grid_.block;
    const int64_t x_bytes = rows * h_.stride[1] * in_.pixel * static_cast<int64_t>(sizeof(X));
    const bool x_far = !copies_ && h_.walk != Walk::kColumns && win_.batch * in_.image > kNear && x_bytes <= kL1;
    const bool y_far = whole && win_.rows() * h_.n * y_size > kNear;
    if (!(x_far || y_far) || tile >= tiles() || h_.groups > 1) return f;
    const int64_t b = tile * shape_.blocks;
    const auto [image, y, x] = place(b / grid_.per_line, b % grid_.per_line * grid_.block);
    if (x_far) {  // the last line that its windows see
      const X* row = in_.x + image * in_.image + y * h_.stride[0] * in_.line + x * h_.stride[1] * in_.pixel;
      f.x = reinterpret_cast<const uint8_t*>(row + tap_.back() / in_.line * in_.line);
      f.x_bytes = x_bytes;
    }
    if (y_far) {
      const int64_t at = add ? image * out_.add_image + y * out_.add_line + x * out_.add_pixel
                             : image * out_.image + y * out_.line + x * out_.pixel;
      f.y = static_cast<const uint8_t*>(add ? e.add : e.y) + at * y_size;
      f.y_bytes = rows * (add ? out_.add_pixel : out_.pixel) * y_size;
    }
    return f;
  }

  /// The rows from where scale group s begins.
  const X* const* segment(Rows<X>& rows, int64_t s) const {
    if (s == 0) return rows.row;
    for (int i = 0; i < rows.m; ++i) rows.segment[i] = rows.row[i] + s * layer_.segment_run();
    return rows.segment;
  }

 private:
  static constexpr bool kInt = std::is_same_v<X, uint8_t>, kPlanes = std::is_same_v<X, cpu::Bf16>;
  static constexpr int64_t kL1 = 32 * 1024;  // most of it

  const Layer& layer_;
  const LayerHeader& h_;
  const Window& win_;
  const LayerInput<X>& in_;
  const LayerOutput& out_;
  const cpu::Isa isa_;
  const cpu::TileShape shape_;
  const bool scaled_, listed_;
  const int64_t gathered_run_;
  const std::vector<int64_t> tap_;
  std::vector<int64_t> gathered_tap_;
  const Grid grid_;
  const bool copies_;                    // tiles' rows are copied together
  const int64_t column_, columns_size_;  // elements of an input column, and of all that an output row's windows see

  std::vector<int64_t> tap_offsets() const {
    std::vector<int64_t> offsets;
    const bool lines = h_.walk == Walk::kLines || h_.walk == Walk::kColumns;
    for (int64_t y = 0; y < h_.kernel[0]; ++y)
      for (int64_t x = 0; x < (lines ? 1 : h_.kernel[1]); ++x)
        offsets.push_back(y * h_.dilation[0] * in_.line + x * h_.dilation[1] * in_.pixel);
    return offsets;
  }

  Grid make_grid(Grid::Lines lines, int64_t columns, bool copied) const {
    const int64_t height = win_.out(0), width = win_.out(1);
    Grid g{lines, width, height * win_.batch, 0, 0, columns, copied};
    if (lines == Grid::kImages) {
      g.width = (height - 1) * columns + width;
      g.count = win_.batch;
    } else if (lines == Grid::kBatch) {
      g.width = win_.rows();
      g.count = 1;
    }
    g.per_line = ceil_div(g.width, shape_.block);
    g.block = shape_.strict ? ceil_div(g.width, g.per_line) : shape_.block;
    return g;
  }
  Grid plan_grid(int64_t passes) const {
    const int64_t columns = in_.line / in_.pixel, width = win_.out(1);
    const bool dense = h_.stride[0] == 1 && h_.stride[1] == 1;
    const bool one_run = dense && columns == width && in_.image == win_.out(0) * in_.line;
    if (h_.walk == Walk::kColumns) return make_grid(Grid::kRows, width, false);
    const bool always = h_.walk == Walk::kNatural;
    const Grid batch = make_grid(Grid::kBatch, width, always || (shape_.strict && !one_run));
    if (!batch.copied || always) return batch;
    // Cycles of a product: a block's rows, but not less than what loading the weights takes; and of copies. Copied rows
    // see every input many times, so a tile of them may not stay in L1: from L2 products take half as long again.
    const int64_t panels = h_.panels * h_.groups, copies = kPlanes ? 4 * passes : 1;
    const int64_t row_bytes = h_.taps * gathered_run_ * in_.planes * static_cast<int64_t>(sizeof(X));
    const auto cost = [&](const Grid& g) {
      int64_t product = std::max<int64_t>(4 * g.block, 45) * panels;
      if (g.copied && shape_.blocks * g.block * row_bytes > kL1) product += product / 2;
      return ceil_div(g.blocks(), 2) * (product + (g.copied ? 2 * g.block * copies : 0));
    };
    Grid best = batch;
    const Grid rows = make_grid(Grid::kRows, width, false), images = make_grid(Grid::kImages, columns, false);
    if (cost(rows) <= cost(best)) best = rows;
    if (dense && cost(images) < cost(best)) best = images;
    return best;
  }

  struct Place {
    int64_t image, y, x;
  };
  /// Of a position on a line.
  Place place(int64_t line, int64_t position) const {
    int64_t image = line;
    if (grid_.lines != Grid::kImages) {
      const int64_t all = line * grid_.width + position, pixels = win_.pixels();
      image = all / pixels;
      position = all % pixels;
    }
    return {image, position / grid_.columns, position % grid_.columns};
  }
  /// An output row's columns, made if they are not there.
  const X* interleaved(Columns<X>& columns, int64_t row) const {
    const int64_t slots = static_cast<int64_t>(columns.row.size()), slot = row % slots;
    X* const to = columns.storage.get() + slot * in_.planes * columns_size_;
    if (std::exchange(columns.row[static_cast<size_t>(slot)], row) == row) return to;
    const X* from = in_.x + row / win_.out(0) * in_.image + row % win_.out(0) * h_.stride[0] * in_.line;
    const int64_t count = (win_.out(1) - 1) * h_.stride[1] + h_.kernel[1], c = in_.pixel;
    for (int p = 0; p < in_.planes; ++p) interleave(from + p * in_.plane, c, count, to + p * columns_size_);
    return to;
  }
  /// The lines at tap_.
  void interleave(const X* from, int64_t c, int64_t count, X* to) const {
    if constexpr (kInt) {
      cpu::k_interleave.at(isa_)(from, tap_.data(), h_.kernel[0], c, count, to);
    } else {
      for (int64_t x = 0; x < count; ++x, from += c)
        for (int64_t y = 0; y < h_.kernel[0]; ++y) to = std::copy_n(from + tap_[y], c, to);
    }
  }
  void locate_block(Rows<X>& rows, int64_t b, const X* base, Columns<X>& columns) const {
    const int64_t line = b / grid_.per_line, wanted = b % grid_.per_line * grid_.block;
    // A block that would pass the end of its line starts earlier and drops what was done before.
    const int64_t start = shape_.strict ? std::min(wanted, grid_.width - grid_.block) : wanted;
    auto [image, y, x] = place(line, start);
    const int64_t step = h_.stride[1] * column_;
    const X* const line_columns = h_.walk == Walk::kColumns ? interleaved(columns, line) : nullptr;
    const int first = rows.m, last = first + static_cast<int>(std::min(grid_.block, grid_.width - start));
    for (int i = first; i < last;) {  // output row by output row
      const int end = static_cast<int>(std::min<int64_t>(last, i + grid_.columns - x));
      const int real = static_cast<int>(std::clamp<int64_t>(i + win_.out(1) - x, i, end));
      const X* row = line_columns != nullptr ? line_columns + x * step
                                             : base + image * in_.image + y * h_.stride[0] * in_.line + x * step;
      const int64_t at = image * out_.image + y * out_.line + x * out_.pixel;
      const int64_t add_at = image * out_.add_image + y * out_.add_line + x * out_.add_pixel;
      if constexpr (kInt)
        if (scaled_)
          for (int j = i; j < end; ++j) {
            rows.sx[j] = in_.scale[image];
            rows.zx[j] = in_.zero[image];
          }
      const int needed = listed_ && !copies_ ? std::min(first + 1, end) : end;  // a block's first row
      for (int j = i; j < needed; ++j) rows.row[j] = row + (j - i) * step;
      if (listed_) {
        const int begin = std::max(i, first + static_cast<int>(wanted - start)), count = std::max(0, real - begin);
        list(rows, begin, count, at + (begin - i) * out_.pixel, add_at + (begin - i) * out_.add_pixel);
      } else {
        if (out_.epilogue.add != nullptr)
          for (int j = i; j < real; ++j) rows.add_at[j] = add_at + (j - i) * out_.add_pixel;
        for (int j = i; j < real; ++j) rows.at[j] = at + (j - i) * out_.pixel;
        for (int j = real; j < end; ++j) rows.at[j] = -1;
      }
      i = end;
      x = 0;
      if (++y == win_.out(0)) {
        y = 0;
        ++image;
      }
    }
    for (int64_t i = start; i < wanted && !listed_; ++i) rows.at[first + i - start] = -1;
    rows.m = last;
  }
  /// Neighbouring rows that are wanted, and after the last one that one again.
  void list(Rows<X>& rows, int first, int count, int64_t at, int64_t add_at) const {
    const int n = rows.count;
    const int64_t pixel = out_.pixel, add_pixel = out_.add_pixel;
    for (int i = 0; i < kListed; ++i) rows.from[n + i] = static_cast<uint8_t>(first + i);
    for (int i = 0; i < kListed; ++i, at += pixel) rows.at[n + i] = at;
    if (out_.epilogue.add != nullptr)
      for (int i = 0; i < kListed; ++i, add_at += add_pixel) rows.add_at[n + i] = add_at;
    rows.count = n + count;
    const int last = std::max(rows.count, 1) - 1;
    rows.from[last + 1] = rows.from[last];
    rows.at[last + 1] = rows.at[last];
    rows.add_at[last + 1] = rows.add_at[last];
  }
  template <typename Copy>
  void copy_rows(Rows<X>& rows, const Copy& copy) const {
    const int64_t size = h_.taps * gathered_run_;
    if (rows.copy.get() == nullptr) {
      const int64_t all = in_.planes * cpu::kMaxTileM * size;
      rows.copy = Buffer<X>(all);
      // What is past a run is multiplied by zeros, so it must be finite.
      if (kPlanes) std::memset(rows.copy.get(), 0, static_cast<size_t>(all) * sizeof(X) + kSlack);
    }
    for (int p = 0; p < in_.planes; ++p)  // in memory's order
      for (int i = 0; i < rows.m; ++i)
        copy(rows.row[i] + p * in_.plane, rows.copy.get() + (p * cpu::kMaxTileM + i) * size);
    for (int i = 0; i < rows.m; ++i) rows.row[i] = rows.copy.get() + i * size;
    rows.tap = gathered_tap_.data();
    rows.plane = cpu::kMaxTileM * size;
  }
};

}  // namespace cora
