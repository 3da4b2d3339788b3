// A quad-row in memory: how the 128 codes of 32 weight rows by 4 consecutive k are packed for the CPU.
//
// Codes come in the order [32 lanes][4 of k], `bits` wide, as planes of 8, 4, 2 and 1 bits, widest
// first, the widest holding a code's low bits (5 = 4 + 1: four low bits, then the high one):
//   8 bits  128 bytes  byte j is code j
//   4 bits   64 bytes  byte j holds codes j, 64 + j
//   2 bits   32 bytes  byte j holds codes j, 32 + j, 64 + j, 96 + j
//   1 bit    16 bytes  bit i of byte j is code 8 j + i
// So a vector register of 64 codes takes a load, a shift and a mask, whatever the width.
#pragma once

#include <cstdint>
#include <cstring>

namespace cora::cpu {

constexpr int kLanes = 32;
constexpr int kQuad = 4;
constexpr int kQuadRow = kLanes * kQuad;  // codes of a quad-row

constexpr int64_t quad_row_bytes(int bits) { return kQuadRow / 8 * bits; }

/// Asks for the bytes some KiB after `packed`, each line of them: where weights come from memory, the hardware's own
/// prefetching starts anew on every page. (Some of the lines only is worse than none: it misleads the hardware.)
/// To L2: what is asked for so early would push the rest out of L1.
template <int kAhead = 4096>
inline void prefetch_packed(const uint8_t* packed, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(packed + kAhead + b, 0, 2);
}
constexpr int kPanelAhead = 8192;  // a panel is expanded at several times the pace of a product with one row

struct Planes {
  int width[3], shift[3], count;
};
constexpr Planes planes_of(int bits) {
  Planes p{};
  int shift = 0;
  for (int width = 8; width >= 1; width /= 2)
    if (bits - shift >= width) {
      p.width[p.count] = width;
      p.shift[p.count++] = shift;
      shift += width;
    }
  return p;
}

/// codes [128] -> quad_row_bytes(bits) bytes.
inline void pack_quad_row(const uint8_t* codes, int bits, uint8_t* packed) {
  const Planes planes = planes_of(bits);
  for (int p = 0; p < planes.count; ++p) {
    const int width = planes.width[p], bytes = kQuadRow / 8 * width, mask = (1 << width) - 1;
    std::memset(packed, 0, static_cast<size_t>(bytes));
    for (int i = 0; i < kQuadRow; ++i) {
      const int value = codes[i] >> planes.shift[p] & mask;
      if (width == 1)
        packed[i / 8] = static_cast<uint8_t>(packed[i / 8] | value << i % 8);
      else
        packed[i % bytes] = static_cast<uint8_t>(packed[i % bytes] | value << i / bytes * width);
    }
    packed += bytes;
  }
}

/// The inverse.
inline void unpack_quad_row(const uint8_t* packed, int bits, uint8_t* codes) {
  const Planes planes = planes_of(bits);
  std::memset(codes, 0, kQuadRow);
  for (int p = 0; p < planes.count; ++p) {
    const int width = planes.width[p], bytes = kQuadRow / 8 * width, mask = (1 << width) - 1;
    for (int i = 0; i < kQuadRow; ++i) {
      const int value = width == 1 ? packed[i / 8] >> i % 8 : packed[i % bytes] >> i / bytes * width;
      codes[i] = static_cast<uint8_t>(codes[i] | (value & mask) << planes.shift[p]);
    }
    packed += bytes;
  }
}

}  // namespace cora::cpu
