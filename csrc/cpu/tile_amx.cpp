// The matrix products of floats on AMX (of codes: codes_amx.cpp): tile registers of 16 rows by 64 bytes.
// Method: two blocks of up to 16 rows of x by 32 weight rows are two tiles by two, accumulated in four
// more: each loaded tile is used twice, 64 cycles of multiplication for 32 of loads from L1. A block may
// have fewer rows, then its products take as many cycles less: a line of 14 or 28 pixels wastes nothing.
// x is read in place, a block's rows a constant distance apart; a panel's quad-rows (of bfloat16: pairs)
// are the second operand as they stand, lanes 0..15 and 16..31 being the even and odd 64-byte halves.
// Floats are done in bfloat16 planes: a step's weights are loaded once for all of them.
// The adapter's second half is done in bfloat16: int8 factors are exact in it, hidden values are split
// into a sum of two, which keeps 16 of their 24 bits. Results are stored, so that the vector units can
// finish one tile while the tile registers work on the next.
#include "cpu/hidden_amx.h"
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <algorithm>

CORA_BEGIN_AMX

namespace cora::cpu::amx {

namespace {

constexpr int kStep = kRowBytes / static_cast<int>(sizeof(Bf16));  // elements of K a multiplication takes

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];  // tiles 0..5 hold rows of x or sums, 6 and 7 weights
};
struct Configs {
  Config of[kRows + 1];
  Configs() {
    for (int block = 0; block <= kRows; ++block)
      for (int tile = 0; tile < 16; ++tile)
        of[block].rows[tile] = static_cast<uint8_t>(tile < 6 ? block : tile < 8 ? kRows : 0);
  }
};

/// Where the operands of a tile's products lie, one after the other: tap by tap, step by step, plane by plane.
struct Operands {
  const Bf16* const* rows;
  int64_t stride;  // of planes
  int planes;
  const int64_t* tap;
  int64_t taps, steps;
  const Bf16* panel;
  int block;

  /// Products a tile of 16 rows by 16 lanes takes.
  int64_t count() const { return taps * steps * planes; }
  /// Between the rows of block i, in bytes.
  int64_t row_stride(int i) const {
    return block > 1 ? (rows[i * block + 1] - rows[i * block]) * static_cast<int64_t>(sizeof(Bf16)) : 0;
  }
};

template <int kA>
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if (kA > 1) _tile_zero(2);
  if (kA > 1) _tile_zero(3);
}
/// kA blocks of x by 32 lanes; `between` is called after each plane's multiplications were issued.
template <int kA, typename Between>
void multiply(const Operands& o, float* sum, const Between& between) {
  zero_sums<kA>();
  const int64_t stride0 = o.row_stride(0), stride1 = kA > 1 ? o.row_stride(1) : 0;
  const int planes = o.planes;
  const char* w = reinterpret_cast<const char*>(o.panel);
  for (int64_t t = 0; t < o.taps; ++t) {
    const Bf16* x0 = o.rows[0] + o.tap[t];
    const Bf16* x1 = kA > 1 ? o.rows[o.block] + o.tap[t] : nullptr;
    for (int64_t s = 0; s < o.steps; ++s, w += kStepWeights) {
      _tile_loadd(6, w, kWeightRow);
      for (int p = 0; p < planes; ++p) {
        const int64_t at = s * kStep + p * o.stride;
        _tile_loadd(4, x0 + at, stride0);
        _tile_dpbf16ps(0, 4, 6);
        if (p == 0) _tile_loadd(7, w + kRowBytes, kWeightRow);
        _tile_dpbf16ps(1, 4, 7);
        if (kA > 1) {
          _tile_loadd(5, x1 + at, stride1);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        between();
      }
    }
  }
  store_sums<kA>(o.block, sum);
}

/// The same by 16 lanes. Two sums a block take turns, which hides the products' latency; the second
/// lies in the lanes that are not asked for until they are added up.
template <int kA, typename Between>
void multiply_narrow(const Operands& o, float* sum, const Between& between) {
  zero_sums<kA>();
  const int64_t stride0 = o.row_stride(0), stride1 = kA > 1 ? o.row_stride(1) : 0;
  const int planes = o.planes;
  const char* w = reinterpret_cast<const char*>(o.panel);
  const Bf16 *x0 = o.rows[0], *x1 = kA > 1 ? o.rows[o.block] : nullptr;
  const int64_t count = o.count(), *tap = o.tap;
  int64_t step = 0;
  int plane = 0;
  const auto next = [&] {
    if (++plane < planes) return;
    plane = 0;
    w += kStepWeights;
    if (++step < o.steps) return;
    step = 0;
    ++tap;
  };
  const auto at = [&] { return *tap + step * kStep + plane * o.stride; };
  for (int64_t i = 0; i < count; i += 2) {
    _tile_loadd(6, w, kWeightRow);
    _tile_loadd(4, x0 + at(), stride0);
    _tile_dpbf16ps(0, 4, 6);
    if (kA > 1) {
      _tile_loadd(5, x1 + at(), stride1);
      _tile_dpbf16ps(2, 5, 6);
    }
    next();
    if (i + 1 < count) {
      _tile_loadd(7, w, kWeightRow);
      _tile_loadd(4, x0 + at(), stride0);
      _tile_dpbf16ps(1, 4, 7);
      if (kA > 1) {
        _tile_loadd(5, x1 + at(), stride1);
        _tile_dpbf16ps(3, 5, 7);
      }
      next();
    }
    between();
  }
  store_sums<kA>(o.block, sum);
  for (int i = 0; i < kA * o.block; ++i, sum += kLanes)
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_loadu_ps(sum + 16)));
}

/// A tile's products, and meanwhile the pending epilogue.
void multiply_tile(const Operands& o, int m, int lanes, float* sum, Pending* pending) {
  const auto run = [&](const auto& between) {
    if (lanes <= 16)
      m > o.block ? multiply_narrow<2>(o, sum, between) : multiply_narrow<1>(o, sum, between);
    else
      m > o.block ? multiply<2>(o, sum, between) : multiply<1>(o, sum, between);
  };
  if (pending->m == 0) return run([] {});
  // Spread over the products, not below four rows at a time.
  const int64_t all = lanes <= 16 ? (o.count() + 1) / 2 : o.count();
  const int part = static_cast<int>(std::max<int64_t>(4, ((pending->m + all - 1) / all + 1) & ~1));
  run([&] {
    if (pending->m > 0) pending->take(part, avx512::epilogue);
  });
}

}  // namespace

void configure(int block) {
  static const Configs configs;  // in memory: g++ 12 takes only the first eight bytes to be read
  _tile_loadconfig(&configs.of[block]);
}
void release() { _tile_release(); }

void tile_bf16(const Bf16* const* rows, int64_t stride, int planes, const int64_t* tap, int64_t taps, int64_t quads,
               const Bf16* panel, int m, int block, int lanes, float* c, Pending* pending) {
  const int64_t steps = quads * kQuad / kStep;
  multiply_tile(Operands{rows, stride, planes, tap, taps, steps, panel, block}, m, lanes, c, pending);
}

bool split(const float* x, int64_t count, int planes, int64_t stride, Bf16* out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000)), magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i limit = _mm512_set1_epi32(0x6f800000);  // 2^96
  // The odd words of two vectors.
  const __m512i odd =
      _mm512_add_epi16(_mm512_mullo_epi16(_mm512_set1_epi16(2),
                                          _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17,
                                                           16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
                       _mm512_set1_epi16(1));
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32) {
    const int64_t left = count - i;
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
    __m512 v[2] = {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x + i),
                   _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + i + 16)};
    for (const __m512 part : v)
      largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(part), magnitude));
    for (int p = 0; p < planes; ++p) {
      const __m512i bits[2] = {_mm512_castps_si512(v[0]), _mm512_castps_si512(v[1])};
      _mm512_mask_storeu_epi16(out + p * stride + i, mask, _mm512_permutex2var_epi16(bits[0], odd, bits[1]));
      for (int h = 0; h < 2; ++h) v[h] = _mm512_sub_ps(v[h], _mm512_castsi512_ps(_mm512_and_si512(bits[h], upper)));
    }
  }
  return _mm512_cmpgt_epu32_mask(largest, limit) == 0;
}

void panel_bf16(const int8_t* panel, int64_t run, int64_t quads, const int32_t* far, Bf16* out) {
  for (int h = 0; h < 2; ++h) {
    const __m512 f = _mm512_cvtepi32_ps(_mm512_loadu_si512(far + 16 * h));
    for (int64_t q = 0; q < quads; ++q) {
      __m512i weights[kQuad];  // floats, whose lower halves are zero
#pragma GCC unroll 4
      for (int j = 0; j < kQuad; ++j) {
        weights[j] = _mm512_setzero_si512();
        if (q * kQuad + j >= run) continue;
        const __m512i bytes = _mm512_loadu_si512(panel + q * kQuadRow + h * 64);
        const __m512i value = _mm512_srai_epi32(_mm512_slli_epi32(bytes, 24 - 8 * j), 24);
        weights[j] = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(value), f));
      }
      for (int pair = 0; pair < 2; ++pair)
        _mm512_storeu_si512(out + (2 * q + pair) * 2 * kLanes + h * 32,
                            _mm512_or_si512(_mm512_srli_epi32(weights[2 * pair], 16), weights[2 * pair + 1]));
    }
  }
}

void rescale(const float* sum, int m, const float* scale, bool add, float* c) {
  for (int h = 0; h < kLanes; h += 16) {
    const __m512 s = _mm512_loadu_ps(scale + h);
    for (int k = h; k < m * kLanes; k += kLanes)
      _mm512_storeu_ps(
          c + k, _mm512_fmadd_ps(_mm512_loadu_ps(sum + k), s, add ? _mm512_loadu_ps(c + k) : _mm512_setzero_ps()));
  }
}

void store_hidden(const float* c, int m, int ranks, void* u) {
  for (int first = 0; first < ranks; first += kTileRanks)
    for (int i = 0; i < m; ++i)
      store_split(_mm512_loadu_ps(c + i * kLanes + first),
                  static_cast<char*>(u) + (first / kTileRanks * kMaxTileM + i) * 64);
}

void quantized_hidden(const int32_t* acc, const int32_t* correction, const float* alpha, int m, int ranks, void* u) {
  for (int first = 0; first < ranks; first += kTileRanks) {
    const __m512i c = _mm512_loadu_si512(correction + first);
    const __m512 a = _mm512_loadu_ps(alpha + first);
    for (int i = 0; i < m; ++i) {
      const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(acc + i * kLanes + first), c);
      store_split(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), a),
                  static_cast<char*>(u) + (first / kTileRanks * kMaxTileM + i) * 64);
    }
  }
}

void expand_up(const int8_t* b, int64_t rank, void* out) {
  char* to = static_cast<char*>(out);
  for (int64_t r = 0; r < (rank + kTileRanks - 1) / kTileRanks * kTileRanks; ++r)
    for (int h = 0; h < 2; ++h, to += kRowBytes) {
      __m512i v = _mm512_setzero_si512();
      if (r < rank)
        v = _mm512_castps_si512(_mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + r * kLanes + 16 * h)))));
      _mm512_storeu_si512(to, _mm512_or_si512(v, _mm512_srli_epi32(v, 16)));  // exact: lower halves are zero
    }
}

void up_project(const void* u, int m, int block, int64_t rank, const void* b, float* up) {
  static constexpr float kNone[kLanes] = {};
  NoWork none;
  if (m > block) {
    multiply_hidden<2>(u, block, rank, b, kNone, none);
    store_sums<2>(block, up);
  } else {
    multiply_hidden<1>(u, block, rank, b, kNone, none);
    store_sums<1>(block, up);
  }
}

}  // namespace cora::cpu::amx

CORA_END_TARGET

namespace cora::cpu {

TileSession::TileSession(Isa isa, int block) : isa_(isa) {
  if (isa_ == Isa::kAmx) amx::configure(block);
}
TileSession::~TileSession() {
  if (isa_ == Isa::kAmx) amx::release();
}

}  // namespace cora::cpu
#else
namespace cora::cpu {
TileSession::TileSession(Isa isa, int /*block*/) : isa_(isa) {}
TileSession::~TileSession() = default;
}  // namespace cora::cpu
#endif
