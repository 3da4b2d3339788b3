// The matrix products on AMX: tile registers of 16 rows by 64 bytes.
// Method: two blocks of up to 16 rows of x by 32 weight rows are two tiles by two, accumulated in four
// more: each loaded tile is used twice, 64 cycles of multiplication for 32 of loads from L1. A block may
// have fewer rows, then its products take as many cycles less: a line of 14 or 28 pixels wastes nothing.
// x is read in place, a block's rows a constant distance apart; a panel's quad-rows are the second
// operand as they stand, lanes 0..15 and 16..31 being the even and odd 64-byte halves.
// The adapter's second half is done in bfloat16: int8 factors are exact in it, hidden values are split
// into a sum of two, which keeps 16 of their 24 bits. Results are stored, so that the vector units can
// finish one tile while the tile registers work on the next.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <algorithm>

CORA_BEGIN_AMX

namespace cora::cpu::amx {

namespace {

constexpr int kRows = 16;
constexpr int kStep = 64;  // elements of K a multiplication takes

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

/// kA blocks of x by 32 lanes; `between` is called after each multiplication was issued.
template <int kA, typename Between>
void multiply(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t steps, const int8_t* panel,
              int block, int32_t* acc, const Between& between) {
  _tile_zero(0);
  _tile_zero(1);
  if (kA > 1) _tile_zero(2);
  if (kA > 1) _tile_zero(3);
  const int64_t stride0 = block > 1 ? rows[1] - rows[0] : 0;
  const int64_t stride1 = kA > 1 && block > 1 ? rows[block + 1] - rows[block] : 0;
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* x0 = rows[0] + tap[t];
    const uint8_t* x1 = kA > 1 ? rows[block] + tap[t] : nullptr;
    for (int64_t s = 0; s < steps; ++s, panel += kStep * kLanes) {
      _tile_loadd(6, panel, kQuadRow);
      _tile_loadd(4, x0 + s * kStep, stride0);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, panel + 64, kQuadRow);
      _tile_dpbusd(1, 4, 7);
      if (kA > 1) {
        _tile_loadd(5, x1 + s * kStep, stride1);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
      between();
    }
  }
  _tile_stored(0, acc, kLanes * sizeof(int32_t));
  _tile_stored(1, acc + 16, kLanes * sizeof(int32_t));
  if (kA > 1) _tile_stored(2, acc + block * kLanes, kLanes * sizeof(int32_t));
  if (kA > 1) _tile_stored(3, acc + block * kLanes + 16, kLanes * sizeof(int32_t));
}

/// The same by 16 lanes. Two sums a block take turns, which hides the products' latency; the second
/// lies in the lanes that are not asked for until they are added up.
template <int kA, typename Between>
void multiply_narrow(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t steps, const int8_t* panel,
                     int block, int32_t* acc, const Between& between) {
  _tile_zero(0);
  _tile_zero(1);
  if (kA > 1) _tile_zero(2);
  if (kA > 1) _tile_zero(3);
  const int64_t stride0 = block > 1 ? rows[1] - rows[0] : 0;
  const int64_t stride1 = kA > 1 && block > 1 ? rows[block + 1] - rows[block] : 0;
  const int64_t all = taps * steps;
  const auto x_of = [&](int i, int64_t step) { return rows[i] + tap[step / steps] + step % steps * kStep; };
  for (int64_t s = 0; s < all; s += 2, panel += 2 * kStep * kLanes) {
    _tile_loadd(6, panel, kQuadRow);
    _tile_loadd(4, x_of(0, s), stride0);
    _tile_dpbusd(0, 4, 6);
    if (kA > 1) {
      _tile_loadd(5, x_of(block, s), stride1);
      _tile_dpbusd(2, 5, 6);
    }
    if (s + 1 < all) {
      _tile_loadd(7, panel + kStep * kLanes, kQuadRow);
      _tile_loadd(4, x_of(0, s + 1), stride0);
      _tile_dpbusd(1, 4, 7);
      if (kA > 1) {
        _tile_loadd(5, x_of(block, s + 1), stride1);
        _tile_dpbusd(3, 5, 7);
      }
    }
    between();
  }
  _tile_stored(0, acc, kLanes * sizeof(int32_t));
  _tile_stored(1, acc + 16, kLanes * sizeof(int32_t));
  if (kA > 1) _tile_stored(2, acc + block * kLanes, kLanes * sizeof(int32_t));
  if (kA > 1) _tile_stored(3, acc + block * kLanes + 16, kLanes * sizeof(int32_t));
  for (int i = 0; i < kA * block; ++i, acc += kLanes)
    _mm512_storeu_si512(acc, _mm512_add_epi32(_mm512_loadu_si512(acc), _mm512_loadu_si512(acc + 16)));
}

/// bfloat16 as float: the upper half of the word.
inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

}  // namespace

void configure(int block) {
  static const Configs configs;  // in memory: g++ 12 takes only the first eight bytes to be read
  _tile_loadconfig(&configs.of[block]);
}
void release() { _tile_release(); }

void tile_s8(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel, int m,
             int block, int lanes, int32_t* acc, Pending* pending) {
  const int64_t steps = quads * kQuad / kStep;
  const auto run = [&](const auto& between) {
    if (lanes <= 16)
      m > block ? multiply_narrow<2>(rows, tap, taps, steps, panel, block, acc, between)
                : multiply_narrow<1>(rows, tap, taps, steps, panel, block, acc, between);
    else
      m > block ? multiply<2>(rows, tap, taps, steps, panel, block, acc, between)
                : multiply<1>(rows, tap, taps, steps, panel, block, acc, between);
  };
  if (pending == nullptr || pending->m == 0) return run([] {});
  // Spread over the steps, not below four rows at a time.
  const int64_t all = lanes <= 16 ? (taps * steps + 1) / 2 : taps * steps;
  const int part = static_cast<int>(std::max<int64_t>(4, ((pending->m + all - 1) / all + 1) & ~1));
  run([&] {
    if (pending->m > 0) pending->take(part, avx512::epilogue);
  });
}

// Hidden values are kept in tiles of 16 ranks: a row holds their bfloat16 heads, then the rests. B's tiles
// have each pair of ranks [32 lanes][2] twice, once for either.
constexpr int kTileRanks = 16;
constexpr int64_t kUpTile = kRows * kLanes * 2 * 2;  // bytes

inline void store_split(__m512 v, char* out) {
  const __m256i head = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  const __m256i rest = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_sub_ps(v, widen(head))));
  _mm512_storeu_si512(out, _mm512_inserti64x4(_mm512_castsi256_si512(head), rest, 1));
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
  for (int64_t first = 0; first < rank; first += kTileRanks, to += kUpTile)
    for (int pair = 0; pair < kTileRanks / 2; ++pair)
      for (int h = 0; h < 2; ++h) {
        __m512i v[2];
        for (int j = 0; j < 2; ++j) {
          const int64_t r = first + 2 * pair + j;
          v[j] = r < rank ? _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                                _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + r * kLanes + 16 * h)))))
                          : _mm512_setzero_si512();
        }
        const __m512i both = _mm512_or_si512(_mm512_srli_epi32(v[0], 16), v[1]);  // exact: low halves are zero
        _mm512_storeu_si512(to + pair * 128 + h * 64, both);
        _mm512_storeu_si512(to + (pair + kTileRanks / 2) * 128 + h * 64, both);
      }
}

void up_project(const void* u, int m, int block, int64_t rank, const void* b, float* up) {
  const bool two = m > block;
  _tile_zero(0);
  _tile_zero(1);
  if (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t tiles = (rank + kTileRanks - 1) / kTileRanks;
  const char* w = static_cast<const char*>(b);
  for (int64_t tile = 0; tile < tiles; ++tile, w += kUpTile) {
    const char* hidden = static_cast<const char*>(u) + tile * kMaxTileM * 64;
    _tile_loadd(4, hidden, 64);
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, hidden + block * 64, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, up, kLanes * sizeof(float));
  _tile_stored(1, up + 16, kLanes * sizeof(float));
  if (two) {
    _tile_stored(2, up + block * kLanes, kLanes * sizeof(float));
    _tile_stored(3, up + block * kLanes + 16, kLanes * sizeof(float));
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
