// The matrix products on AMX: tile registers of 16 rows by 64 bytes.
// Method: 32 rows of x by 32 weight rows is two tiles by two, accumulated in four more: each loaded
// tile is used twice, 64 cycles of multiplication for 32 of loads from L1. x is read in place, its
// rows a constant distance apart; a panel's quad-rows are the second operand as they stand, lanes
// 0..15 and 16..31 being the even and odd 64-byte halves.
// The adapter's second half is done in bfloat16: int8 factors are exact in it, hidden values are split
// into a sum of two, which keeps 16 of their 24 bits.
#include "cpu/kernels.h"

#if CORA_X86
#include <immintrin.h>

#include <cstring>

CORA_BEGIN_AMX

namespace cora::cpu::amx {

namespace {

constexpr int kRows = 16;
constexpr int kStep = 64;  // elements of K a multiplication takes

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// kA blocks of 16 rows of x by kB of 16 lanes.
template <int kA, int kB>
void multiply(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t steps, const int8_t* panel,
              int32_t* acc) {
  _tile_zero(0);
  if (kB > 1) _tile_zero(1);
  if (kA > 1) _tile_zero(2);
  if (kA > 1 && kB > 1) _tile_zero(3);
  const int64_t stride0 = rows[1] - rows[0], stride1 = kA > 1 ? rows[kRows + 1] - rows[kRows] : 0;
  for (int64_t t = 0; t < taps; ++t) {
    const uint8_t* x0 = rows[0] + tap[t];
    const uint8_t* x1 = kA > 1 ? rows[kRows] + tap[t] : nullptr;
    for (int64_t s = 0; s < steps; ++s, x0 += kStep, panel += kStep * kLanes) {
      _tile_loadd(6, panel, kQuadRow);
      _tile_loadd(4, x0, stride0);
      _tile_dpbusd(0, 4, 6);
      if (kB > 1) {
        _tile_loadd(7, panel + 64, kQuadRow);
        _tile_dpbusd(1, 4, 7);
      }
      if (kA > 1) {
        _tile_loadd(5, x1 + s * kStep, stride1);
        _tile_dpbusd(2, 5, 6);
        if (kB > 1) _tile_dpbusd(3, 5, 7);
      }
    }
  }
  _tile_stored(0, acc, kLanes * sizeof(int32_t));
  if (kB > 1) _tile_stored(1, acc + 16, kLanes * sizeof(int32_t));
  if (kA > 1) _tile_stored(2, acc + kRows * kLanes, kLanes * sizeof(int32_t));
  if (kA > 1 && kB > 1) _tile_stored(3, acc + kRows * kLanes + 16, kLanes * sizeof(int32_t));
}

/// bfloat16 as float: the upper half of the word.
inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

}  // namespace

void configure() {
  static const Config config;  // static: g++ 12 takes only its first eight bytes to be read
  _tile_loadconfig(&config);
}
void release() { _tile_release(); }

void tile_s8(const uint8_t* const* rows, const int64_t* tap, int64_t taps, int64_t quads, const int8_t* panel, int m,
             int lanes, int32_t* acc) {
  const int64_t steps = quads * kQuad / kStep;
  if (m > kRows)
    (lanes > 16 ? multiply<2, 2> : multiply<2, 1>)(rows, tap, taps, steps, panel, acc);
  else
    (lanes > 16 ? multiply<1, 2> : multiply<1, 1>)(rows, tap, taps, steps, panel, acc);
}

// A chunk of hidden values: 32 rows of their bfloat16 heads, then 32 of the rests.
void store_hidden(const float* c, int m, void* u) {
  char* out = static_cast<char*>(u);
  for (int i = 0; i < m; ++i, c += kLanes, out += 64) {
    const __m512 v[2] = {_mm512_loadu_ps(c), _mm512_loadu_ps(c + 16)};
    const __m512i head = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0]));
    const __m512 rest[2] = {_mm512_sub_ps(v[0], widen(_mm512_castsi512_si256(head))),
                            _mm512_sub_ps(v[1], widen(_mm512_extracti64x4_epi64(head, 1)))};
    _mm512_storeu_si512(out, head);
    _mm512_storeu_si512(out + kMaxTileM * 64, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(rest[1], rest[0])));
  }
}

// A chunk of B: 16 pairs of ranks [32 lanes][2], bfloat16.
void expand_up(const int8_t* b, int64_t rank, void* out) {
  char* to = static_cast<char*>(out);
  for (int64_t pair = 0; pair < (rank + kLanes - 1) / kLanes * 16; ++pair)
    for (int h = 0; h < kLanes; h += 16, to += 64) {
      __m512i v[2];
      for (int j = 0; j < 2; ++j) {
        const int64_t r = 2 * pair + j;
        v[j] = r < rank ? _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                              _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + r * kLanes + h)))))
                        : _mm512_setzero_si512();
      }
      _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(v[0], 16), v[1]));  // exact: low halves are zero
    }
}

void up_project(const void* u, int m, int64_t rank, const void* b, float* up) {
  const char* w = static_cast<const char*>(b);
  const int64_t chunks = (rank + kLanes - 1) / kLanes;
  for (int first = 0; first < m; first += kRows) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const char* head = static_cast<const char*>(u) + chunk * kHiddenChunk * sizeof(float) + first * 64;
      _tile_loadd(4, head, 64);
      _tile_loadd(5, head + kMaxTileM * 64, 64);
      _tile_loadd(6, w + chunk * 2048, 128);
      _tile_loadd(7, w + chunk * 2048 + 64, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, up + first * kLanes, kLanes * sizeof(float));
    _tile_stored(1, up + first * kLanes + 16, kLanes * sizeof(float));
  }
}

}  // namespace cora::cpu::amx

CORA_END_TARGET

namespace cora::cpu {

TileSession::TileSession(Isa isa) : isa_(isa) {
  if (isa_ == Isa::kAmx) amx::configure();
}
TileSession::~TileSession() {
  if (isa_ == Isa::kAmx) amx::release();
}

}  // namespace cora::cpu
#else
namespace cora::cpu {
TileSession::TileSession(Isa isa) : isa_(isa) {}
TileSession::~TileSession() = default;
}  // namespace cora::cpu
#endif
