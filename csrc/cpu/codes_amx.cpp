// From codes to a layer's outputs on AMX: one tile by one panel, the adapter's second half with it, and meanwhile on
// the vector units what follows the products of the tile before.
// Floor of a tile of 32 rows by 32 lanes: 64 cycles of multiplication for 64 of K, 64 more for 16 ranks, 64 to store
// either's sums. And near a tile instruction there is one 512-bit floating-point instruction a cycle instead of two
// (measured: the other unit is the tiles'; integers are not slowed down): 64 cycles for each that an output takes. So
// up to K = 256 the epilogue is what an output costs, and it is kept short: sums start at what would be subtracted
// from them, the hidden values' products at the bias; codes are clamped as bytes, and from above only where they could
// pass the integers; everything is in units of the codes' scale from the start.
#include "bits.h"
#include "cpu/codes_avx512.h"
#include "cpu/hidden_amx.h"
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

CORA_BEGIN_AMX

namespace cora::cpu::amx {

namespace {

inline __mmask16 mask16(int lanes) {
  return lanes >= 16  ? static_cast<__mmask16>(0xffff)
         : lanes <= 0 ? __mmask16{0}
                      : static_cast<__mmask16>((1u << lanes) - 1);
}

// What is pending, in pieces of a few pairs of rows that `some` does; `rest` does the rest.

struct Nothing {
  static constexpr bool kOfHidden = false;
  Nothing(const Finish&, int64_t) {}
  void some() {}
  void rest() {}
};

/// Rows two by two, for a kind of work that has pair(i).
template <typename Kind>
class ByPairs : Kind {
 public:
  /// pieces: that it is asked for, at least.
  static constexpr bool kOfHidden = Kind::kOfHidden;
  ByPairs(const Finish& f, int64_t pieces)
      : Kind(f),
        end_((Kind::count(f) + 1) & ~1),
        piece_(static_cast<int>((end_ + 2 * pieces - 1) / (2 * pieces)) * 2) {}
  CORA_INLINE void some() {
    for (const int end = std::min(at_ + piece_, end_); at_ < end; at_ += 2) Kind::pair(at_);
  }
  void rest() {
    for (; at_ < end_; at_ += 2) Kind::pair(at_);
  }

 private:
  int at_ = 0, end_, piece_;
};

/// What rows with zero-points of their own have too much in their sums: zx * wsum, where -wsum = low + 128 high are two
/// 16-bit factors of one dot product, which is a third of the work of a 32-bit product and a difference.
struct RowZeros {
  const int32_t* zx;
  __m512i factors[2];

  explicit RowZeros(const Finish& f) : zx(f.rows->zx) {
    for (int h = 0; h < 2; ++h) {
      const __m512i w = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(f.panel->wsum + 16 * h));
      const __m512i low = _mm512_and_si512(w, _mm512_set1_epi32(127)), high = _mm512_srai_epi32(w, 7);
      factors[h] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
  }
  CORA_INLINE __m512i subtract(__m512i sum, int64_t row, int h) const {
    const uint32_t z = static_cast<uint32_t>(zx[row]);  // of a row that nobody reads it may be anything
    return _mm512_dpwssd_epi32(sum, _mm512_set1_epi32(static_cast<int>(z * (1 + (128 << 16)))), factors[h]);
  }
};
struct NoZeros {
  explicit NoZeros(const Finish&) {}
  CORA_INLINE __m512i subtract(__m512i sum, int64_t, int) const { return sum; }
};

/// Sums of A's lanes -> hidden values. kNarrow: 16 lanes, of which there are two sums. An odd row is followed by one
/// that nobody reads.
template <bool kNarrow, typename Zeros>
struct HiddenRows : Zeros {
  static constexpr bool kOfHidden = true;
  const int32_t* sum;
  char* hidden;
  __m512 alpha[2];

  static int count(const Finish& f) { return f.rows->block * f.rows->blocks; }
  explicit HiddenRows(const Finish& f)
      : Zeros(f),
        sum(f.sum),
        hidden(static_cast<char*>(f.rows->hidden) + f.panel->chunk * kHiddenChunk * static_cast<int>(sizeof(float))) {
    for (int h = 0; h < 2; ++h) alpha[h] = _mm512_loadu_ps(f.panel->alpha + 16 * h);
  }
  CORA_INLINE void pair(int first) const {
    for (int i = first; i < first + 2; ++i)
      for (int h = 0; h < (kNarrow ? 1 : 2); ++h) {
        __m512i v = _mm512_loadu_si512(sum + i * kLanes + 16 * h);
        if (kNarrow) v = _mm512_add_epi32(v, _mm512_loadu_si512(sum + i * kLanes + 16));
        v = Zeros::subtract(v, i, h);
        store_split(_mm512_mul_ps(_mm512_cvtepi32_ps(v), alpha[h]), hidden + (h * kMaxTileM + i) * kRowBytes);
      }
  }
};

/// kByRow: floats, of rows with scales of their own. kBounded: codes, each one's number is known to be an integer's.
enum class Out { kFloats, kByRow, kCodes, kBounded };

/// Sums -> outputs, as `Epilogue` says it, two rows at a time: their codes are packed together.
template <bool kUp, Out kOut, Added kAdd>
struct OutputRows : std::conditional_t<kOut == Out::kByRow, RowZeros, NoZeros> {
  const int32_t* sum;
  const float* sx;
  const float* up;
  const uint8_t *from, *add;
  const int64_t *at, *add_at;
  uint8_t* y;
  bool clamped;
  __mmask16 masks[2];
  __m512 alpha[2], bias[2], low, high, inverse, add_scale, add_zero;
  __m512i zero, least, most, order;

  static constexpr bool kOfHidden = false, kByRow = kOut == Out::kByRow;
  static constexpr bool kCodes = kOut != Out::kFloats && !kByRow;

  static int count(const Finish& f) { return f.rows->count; }
  explicit OutputRows(const Finish& f)
      : std::conditional_t<kByRow, RowZeros, NoZeros>(f),
        sum(f.sum),
        sx(f.rows->sx),
        up(f.up),
        from(f.rows->from),
        add(static_cast<const uint8_t*>(f.panel->add)),
        at(f.rows->at),
        add_at(f.rows->add_at),
        y(static_cast<uint8_t*>(f.panel->y)) {
    const Epilogue& e = *f.panel->e;
    for (int h = 0; h < 2; ++h) {
      masks[h] = mask16(f.panel->lanes - 16 * h);
      alpha[h] = _mm512_loadu_ps(f.panel->alpha + 16 * h);
      bias[h] = _mm512_loadu_ps(f.panel->bias + 16 * h);
    }
    clamped = e.low > -INFINITY || e.high < INFINITY;
    low = _mm512_set1_ps(e.low);
    high = _mm512_set1_ps(kCodes ? e.code_high : e.high);
    inverse = _mm512_set1_ps(e.inverse_scale);
    add_scale = _mm512_set1_ps(e.add_scale);
    add_zero = _mm512_set1_ps(kMagic + e.add_zero);
    zero = _mm512_set1_epi16(static_cast<int16_t>(e.zero_point));
    least = _mm512_set1_epi8(static_cast<char>(e.least_code));
    most = _mm512_set1_epi8(static_cast<char>(e.most_code));
    order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  }

  static constexpr float kMagic = 8388608.0f;  // 2^23: its bits plus a code are the sum's
  /// code - zero, exact.
  __m512 added_code(const uint8_t* from, __mmask16 mask) const {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from));
    return _mm512_sub_ps(_mm512_castsi512_ps(_mm512_or_si512(code, _mm512_set1_epi32(0x4b000000))), add_zero);
  }
  CORA_INLINE __m512 value(int i, int h) const {
    const int64_t row = from[i], k = row * kLanes + 16 * h;
    __m512 v = _mm512_cvtepi32_ps(this->subtract(_mm512_loadu_si512(sum + k), row, h));
    if (kByRow && !kUp)
      v = _mm512_mul_ps(v, alpha[h]);
    else
      v = _mm512_fmadd_ps(v, alpha[h], kUp ? _mm512_loadu_ps(up + k) : bias[h]);
    if (kByRow) v = _mm512_fmadd_ps(v, _mm512_set1_ps(sx[row]), bias[h]);
    if (kAdd == Added::kCodes) {
      v = _mm512_fmadd_ps(added_code(add + add_at[i] + 16 * h, masks[h]), add_scale, v);
    } else if (kAdd == Added::kFloats) {
      const float* more = reinterpret_cast<const float*>(add) + add_at[i] + 16 * h;
      v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(masks[h], more));
    }
    return v;
  }
  /// Rounded; the smallest integer where that is below the integers or a NaN.
  CORA_INLINE __m512i code(int i, int h) const {
    __m512 v = value(i, h);
    if (kAdd == Added::kFloats) v = _mm512_mul_ps(v, inverse);  // others are in units of the codes' scale
    return _mm512_cvtps_epi32(kOut == Out::kBounded ? v : _mm512_min_ps(high, v));  // min leaves a NaN in its second
  }
  CORA_INLINE void pair(int i) const {  // the last one is listed twice where their number is odd
    if (kCodes) {
      __m512i words[2];
      for (int r = 0; r < 2; ++r)
        words[r] = _mm512_adds_epi16(_mm512_packs_epi32(code(i + r, 0), code(i + r, 1)), zero);
      const __m512i bytes = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(words[0], words[1]), least), most);
      const __m512i codes = _mm512_permutexvar_epi32(order, bytes);
      const __mmask32 mask = static_cast<__mmask32>(masks[1]) << 16 | masks[0];
      _mm256_mask_storeu_epi8(y + at[i], mask, _mm512_castsi512_si256(codes));
      _mm256_mask_storeu_epi8(y + at[i + 1], mask, _mm512_extracti64x4_epi64(codes, 1));
    } else if (clamped) {
      store_floats<true>(i);
    } else {
      store_floats<false>(i);
    }
  }
  template <bool kClamped>
  CORA_INLINE void store_floats(int i) const {
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < 2; ++h) {
        __m512 v = value(i + r, h);
        if (kClamped) v = _mm512_min_ps(high, _mm512_max_ps(low, v));  // a NaN in the second operand stays
        _mm512_mask_storeu_ps(reinterpret_cast<float*>(y) + at[i + r] + 16 * h, masks[h], v);
      }
  }
};

/// A step of two blocks (or one) by 32 lanes; between(0) after the first multiplication, 1 and 2 after a block's last.
template <int kBlocks, typename Between>
CORA_INLINE void multiply_step(const int8_t* w, const uint8_t* x0, const uint8_t* x1, int64_t stride,
                               const Between& between) {
  _tile_loadd(6, w, kWeightRow);
  _tile_loadd(4, x0, stride);
  _tile_dpbusd(0, 4, 6);
  between(std::integral_constant<int, 0>());
  _tile_loadd(7, w + kRowBytes, kWeightRow);
  _tile_dpbusd(1, 4, 7);
  between(std::integral_constant<int, 1>());
  if (kBlocks > 1) {
    _tile_loadd(5, x1, stride);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    between(std::integral_constant<int, 2>());
  }
}

/// All steps. kAhead: there is memory to ask for.
template <int kBlocks, bool kAhead, typename Work>
CORA_INLINE void multiply_all(CodesTile& t, Work& work) {
  const CodesRows& r = *t.rows;
  const int64_t stride = r.x_stride, steps = t.panel->steps;
  const int64_t* const end = r.tap + r.taps;
  const int8_t* w = t.panel->weights;
  Ahead ahead[2] = {t.ahead[0], t.ahead[1]};
  for (const int64_t* tap = r.tap; tap < end; ++tap) {
    const uint8_t *x0 = r.x[0] + *tap, *x1 = r.x[1] + *tap;
    for (int64_t s = steps; s > 0; --s, w += kStepWeights, x0 += kRowBytes, x1 += kRowBytes) {
      multiply_step<kBlocks>(w, x0, x1, stride, [&](auto place) __attribute__((always_inline)) {
        if (place == 0) return;
        work.some();
        if (kAhead) {
          for (int i = 0; i < ahead[0].lines; ++i, ahead[0].from += 64) __builtin_prefetch(ahead[0].from);
          for (int i = 0; i < ahead[1].lines; ++i, ahead[1].from += 64) __builtin_prefetch(ahead[1].from, 1);
        }
      });
    }
  }
  if (kAhead)
    for (int i = 0; i < 2; ++i) t.ahead[i].from = ahead[i].from;
}
template <int kBlocks>
CORA_INLINE void start_products(const int32_t* start) {
  if (start != nullptr) return start_sums<kBlocks>(start);
  _tile_zero(0);
  _tile_zero(1);
  if (kBlocks > 1) _tile_zero(2);
  if (kBlocks > 1) _tile_zero(3);
}
template <int kBlocks, typename Work>
CORA_INLINE void multiply(CodesTile& t, Work& work) {
  start_products<kBlocks>(t.panel->start);
  if (t.ahead[0].lines + t.ahead[1].lines > 0)
    multiply_all<kBlocks, true>(t, work);
  else
    multiply_all<kBlocks, false>(t, work);
}

/// The same by a packed panel. A step's weights are expanded some steps before they are used, a third of them after
/// each product (an eighth faster than all at once), and into a buffer that stays in L1: to write the whole panel to L2
/// and read it from there takes longer than the products of a few tiles.
template <int kBlocks, int kBits>
void multiply_packed(const CodesPanel& p, const CodesRows& r) {
  constexpr int kQuadRows = kStepWeights / kQuadRow, kBytes = quad_row_bytes(kBits);  // of a step, of a quad-row
  constexpr int64_t kRing = 4, kBefore = 3;                                           // steps
  alignas(64) int8_t ring[kRing * kStepWeights];
  const int64_t stride = r.x_stride, all = r.taps * p.steps;
  const Expander<kBits> expander(p.offset);
  const auto expand = [&](int64_t s, int first, int end) __attribute__((always_inline)) {
    const uint8_t* const from = p.packed + std::min(s, all - 1) * kQuadRows * kBytes;  // behind the last one, it again
    int8_t* const to = ring + s % kRing * kStepWeights;
    prefetch_packed<kPanelAhead>(from + first * kBytes, (end - first) * kBytes);
#pragma GCC unroll 16
    for (int q = first; q < end; ++q) expander.quad_row(from + q * kBytes, to + q * kQuadRow);
  };
  start_products<kBlocks>(p.start);
  for (int64_t s = 0; s < kBefore; ++s) expand(s, 0, kQuadRows);
  int64_t s = 0;
  for (int64_t tap = 0; tap < r.taps; ++tap) {
    const uint8_t *x0 = r.x[0] + r.tap[tap], *x1 = r.x[1] + r.tap[tap];
    for (const int64_t end = s + p.steps; s < end; ++s, x0 += kRowBytes, x1 += kRowBytes) {
      multiply_step<kBlocks>(ring + s % kRing * kStepWeights, x0, x1, stride,
                             [&](auto part) __attribute__((always_inline)) {
                               constexpr int kParts = kBlocks + 1;
                               expand(s + kBefore, kQuadRows * part / kParts, kQuadRows * (part + 1) / kParts);
                             });
    }
  }
}

/// The same by 16 lanes. Two sums a block take turns, which hides the products' latency; the second lies in the
/// lanes that are not asked for until they are added up.
template <int kBlocks, typename Work>
CORA_INLINE void multiply_narrow(const CodesPanel& p, const CodesRows& r, Work& work) {
  start_products<kBlocks>(nullptr);
  if (p.start != nullptr) {
    _tile_loadd(0, p.start, 0);
    if (kBlocks > 1) _tile_loadd(2, p.start, 0);
  }
  const int64_t stride = r.x_stride, count = r.taps * p.steps;
  const int8_t* w = p.weights;
  int64_t tap = 0, step = 0;
  const auto next = [&] {
    w += kStepWeights;
    if (++step == p.steps) {
      step = 0;
      ++tap;
    }
  };
  for (int64_t i = 0; i < count; i += 2) {
    int64_t at = r.tap[tap] + step * kRowBytes;
    _tile_loadd(6, w, kWeightRow);
    _tile_loadd(4, r.x[0] + at, stride);
    _tile_dpbusd(0, 4, 6);
    if (kBlocks > 1) {
      _tile_loadd(5, r.x[1] + at, stride);
      _tile_dpbusd(2, 5, 6);
    }
    work.some();
    next();
    if (i + 1 < count) {
      at = r.tap[tap] + step * kRowBytes;
      _tile_loadd(7, w, kWeightRow);
      _tile_loadd(4, r.x[0] + at, stride);
      _tile_dpbusd(1, 4, 7);
      if (kBlocks > 1) {
        _tile_loadd(5, r.x[1] + at, stride);
        _tile_dpbusd(3, 5, 7);
      }
      work.some();
      next();
    }
  }
}

template <int kBlocks, bool kNarrow, typename Work>
void run(CodesTile& t, const Finish& pending) {
  const CodesPanel& p = *t.panel;
  const CodesRows& r = *t.rows;
  const bool up = p.b != nullptr, own = Work::kOfHidden && up;  // what is pending may be read by this
  const int64_t steps = r.taps * p.steps;
  Work work(pending, (kNarrow ? steps : kBlocks * steps) + 2 * kBlocks + (up && !own ? 3 * kBlocks : 0));
  if (std::is_same_v<Work, Nothing> && !kNarrow && p.packed != nullptr) {
    CORA_DISPATCH_BITS(p.bits, [&] { multiply_packed<kBlocks, kBits>(p, r); });
  } else if (kNarrow) {
    multiply_narrow<kBlocks>(p, r, work);
  } else {
    multiply<kBlocks>(t, work);
  }
  store_sums<kBlocks>(r.block, t.sum, work);
  if (kNarrow && p.result != Result::kHidden)
    for (int k = 0; k < kBlocks * r.block * kLanes; k += kLanes)
      _mm512_storeu_si512(t.sum + k,
                          _mm512_add_epi32(_mm512_loadu_si512(t.sum + k), _mm512_loadu_si512(t.sum + k + 16)));
  if (own) work.rest();
  if (up) {
    multiply_hidden<kBlocks>(r.hidden, r.block, p.rank, p.b, p.up_bias, work);
    store_sums<kBlocks>(r.block, t.up, work);
  }
  work.rest();
}

template <typename Work>
void run_wide(CodesTile& t, const Finish& pending) {
  run<2, false, Work>(t, pending);
}
template <typename Work>
void run_narrow(CodesTile& t, const Finish& pending) {
  run<2, true, Work>(t, pending);
}
template <typename Work>
void finish_all(CodesTile&, const Finish& pending) {
  Work(pending, 1).rest();
}

/// The function for what is pending.
#define CORA_ADDED(Run, up, out)                                                                          \
  {Run<ByPairs<OutputRows<up, out, Added::kNothing>>>, Run<ByPairs<OutputRows<up, out, Added::kFloats>>>, \
   Run<ByPairs<OutputRows<up, out, Added::kCodes>>>}
#define CORA_OUTS(Run, up)                                                                                \
  {CORA_ADDED(Run, up, Out::kFloats), CORA_ADDED(Run, up, Out::kByRow), CORA_ADDED(Run, up, Out::kCodes), \
   CORA_ADDED(Run, up, Out::kBounded)}
#define CORA_HIDDEN(Run, Zeros) {Run<ByPairs<HiddenRows<false, Zeros>>>, Run<ByPairs<HiddenRows<true, Zeros>>>}
#define CORA_SELECT(Run)                                                                          \
  [&] {                                                                                           \
    using Fn = void(CodesTile&, const Finish&);                                                   \
    static constexpr Fn* kOutputs[2][4][3] = {CORA_OUTS(Run, false), CORA_OUTS(Run, true)};       \
    static constexpr Fn* kHidden[2][2] = {CORA_HIDDEN(Run, NoZeros), CORA_HIDDEN(Run, RowZeros)}; \
    if (pending.panel == nullptr) return static_cast<Fn*>(Run<Nothing>);                          \
    const CodesPanel& of = *pending.panel;                                                        \
    const bool by_row = of.wsum != nullptr;                                                       \
    if (of.result == Result::kHidden) return kHidden[by_row][of.lanes <= 16];                     \
    const Out codes = of.result == Result::kBounded ? Out::kBounded : Out::kCodes;                \
    const Out out = of.result != Result::kFloats ? codes : by_row ? Out::kByRow : Out::kFloats;   \
    return kOutputs[of.b != nullptr][static_cast<int>(out)][static_cast<int>(of.added)];          \
  }()

}  // namespace

void finish(Finish& pending) {
  CodesTile none{};
  CORA_SELECT(finish_all)(none, pending);
  pending.panel = nullptr;
}

void codes_tile(CodesTile& t, Finish& pending) {
  const bool packed = t.panel->packed != nullptr, narrow = t.panel->lanes <= 16 && !packed;
  if (t.rows->blocks == 1 || packed) {  // rare: an odd block at the end, or much more to multiply than to finish
    finish(pending);
    if (t.rows->blocks == 2) return run<2, false, Nothing>(t, pending);
    return narrow ? run<1, true, Nothing>(t, pending) : run<1, false, Nothing>(t, pending);
  }
  narrow ? CORA_SELECT(run_narrow)(t, pending) : CORA_SELECT(run_wide)(t, pending);
}

void tile_s8(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel,
             int /*widest*/, int m, int block, int lanes, int32_t* acc) {
  CodesRows r{};
  r.block = block;
  r.blocks = m / block;
  r.x[0] = rows[0];
  r.x[1] = rows[m - block];
  r.x_stride = block > 1 ? rows[1] - rows[0] : 0;
  r.tap = tap;
  r.taps = taps;
  CodesPanel p{};
  p.weights = panel;
  p.steps = quads * kQuad / kRowBytes;
  p.lanes = lanes;
  p.result = Result::kFloats;
  CodesTile t{};
  t.panel = &p;
  t.rows = &r;
  t.sum = acc;
  Finish none{};
  codes_tile(t, none);
}

}  // namespace cora::cpu::amx

CORA_END_TARGET
#endif
