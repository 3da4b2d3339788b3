// A prepared layer: weight, adapter, bias and geometry in the order the CPU kernels read them, as one
// uint8 tensor. The weight keeps its bits; the order is the same on every CPU level.
//
// Output channels are lanes, in panels of 32 a group; K is walked as `taps` runs of `run` elements, cut
// into `segments` where scale groups are. A panel's weight is quad-rows (cpu/planes.h)
// [segments][taps][quads]; every per-lane array is [panels][segments][32] or [panels][32].
#pragma once

#include "bits.h"
#include "check.h"
#include "cpu/kernels.h"
#include "ops/scratch.h"

#include <algorithm>

namespace cora {

/// The order in which a layer's K is walked.
enum class Walk : int32_t {
  kTaps,     // tap by tap, a group's channels contiguous
  kLines,    // kernel row by kernel row, (column, channel) contiguous: longer runs
  kColumns,  // kernel column by kernel column, (row, channel) contiguous, in one run: for few channels, whose lines are
             // short. The input lines that an output row sees, interleaved, hold every window of the row in place
  kNatural,  // channel by channel, also copied: for scale groups that cut through a channel's taps
};

enum class AdapterKind : int32_t { kNone, kInt8, kFloat };

struct LayerHeader {
  uint64_t magic;
  int64_t bytes;
  int64_t n, channels, kernel[2], stride[2], padding[2], dilation[2], groups;
  int64_t taps, run, segments, panels, chunks, rank;  // panels and chunks (of 32 ranks) a group
  int32_t bits, a_widest;                             // a_widest: the largest of an int8 adapter's A
  Walk walk;
  AdapterKind adapter;
  bool linear, depthwise, far, has_bias, narrow;  // narrow: corrected sums fit int32
  bool bf16;                                      // code - zero_point is exact in bfloat16
  bool ready, a_ready;                            // 8-bit codes (of an int8 A) are stored less their offset, 128
  int64_t planes;                                 // of a depthwise layer: int8 values whose sum is a weight
  // Offsets of the arrays below, in bytes; depthwise.cpp says which it has.
  int64_t codes, offset, scale, zero_point, wsum, far_zero, bias, a, a_scale, a_sum, b, merged;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// Lays arrays out behind the header, each at a cache line's start.
class Arrays {
 public:
  /// The offset of the next `bytes` bytes.
  int64_t take(int64_t bytes) {
    const int64_t from = end_;
    end_ = round_up(end_ + bytes, 64);
    return from;
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = round_up(sizeof(LayerHeader), 64);
};

/// Views into a prepared layer. Weight lanes that do not exist have scale 0.
struct Layer {
  const LayerHeader* h;

  template <typename T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(h) + offset);
  }
  int64_t group_n() const { return h->n / h->groups; }
  int64_t group_channels() const { return h->channels / h->groups; }
  int64_t segment_run() const { return h->run / h->segments; }
  int64_t quads() const { return (segment_run() + cpu::kQuad - 1) / cpu::kQuad; }  // of a segment's run
  int64_t a_quads() const { return (h->run + cpu::kQuad - 1) / cpu::kQuad; }
  int64_t segment_bytes() const { return h->taps * quads() * cpu::quad_row_bytes(h->bits); }

  // p counts panels over all groups, s segments.
  const uint8_t* codes(int64_t p, int64_t s) const {
    return at<uint8_t>(h->codes) + (p * h->segments + s) * segment_bytes();
  }
  const uint8_t* offset(int64_t p, int64_t s) const { return lanes<uint8_t>(h->offset, p, s); }
  /// What is to be subtracted from codes as they are stored.
  const uint8_t* stored_offset(int64_t p, int64_t s) const {
    static constexpr uint8_t kNone[cpu::kLanes] = {};
    return h->ready ? kNone : offset(p, s);
  }
  const float* scale(int64_t p, int64_t s) const { return lanes<float>(h->scale, p, s); }
  const int32_t* zero_point(int64_t p, int64_t s) const { return lanes<int32_t>(h->zero_point, p, s); }
  /// zero_point - offset: what of a zero-point does not fit the int8 weights.
  const int32_t* far(int64_t p, int64_t s) const {
    static constexpr int32_t kNear[cpu::kLanes] = {};
    return h->far ? lanes<int32_t>(h->far_zero, p, s) : kNear;
  }
  /// Sum of code - offset.
  const int32_t* wsum(int64_t p, int64_t s) const { return lanes<int32_t>(h->wsum, p, s); }
  const float* bias(int64_t p) const { return h->has_bias ? at<float>(h->bias) + p * cpu::kLanes : nullptr; }
  // The adapter, q counting chunks over all groups: A as quad-rows [taps][a_quads] of
  // 8-bit codes with zero-point 128 (or less it: a_ready), or floats [taps][run][32]; B int8 or float [rank][32] a
  // panel.
  int64_t a_size() const {
    return h->adapter == AdapterKind::kInt8 ? h->taps * a_quads() * cpu::kQuadRow
                                            : h->taps * h->run * cpu::kLanes * int64_t{sizeof(float)};
  }
  template <typename T>
  const T* a(int64_t q) const {
    return at<T>(h->a + q * a_size());
  }
  const float* a_scale(int64_t q) const { return at<float>(h->a_scale) + q * cpu::kLanes; }
  const int32_t* a_sum(int64_t q) const { return at<int32_t>(h->a_sum) + q * cpu::kLanes; }
  template <typename T>
  const T* b(int64_t p) const {
    return at<T>(h->b) + p * h->rank * cpu::kLanes;
  }

 private:
  template <typename T>
  const T* lanes(int64_t offset, int64_t p, int64_t s) const {
    return at<T>(offset) + (p * h->segments + s) * cpu::kLanes;
  }
};

/// Checks that `blob` is a prepared layer and returns its view.
Layer view_layer(const char* op, const Tensor& blob);

}  // namespace cora
