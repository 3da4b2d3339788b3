// The packed layout: the one place (with its oracle in cora/reference.py) that knows the bit order.
// See docs/packed_layout.md. A row of K codes of `bits` bits is a little-endian bit stream: code i
// occupies bits [i*bits, (i+1)*bits) of the row, least significant first; the row is padded with
// zeros to a whole byte. Host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CORA_HOST_DEVICE __host__ __device__
#else
#define CORA_HOST_DEVICE
#endif

namespace cora {

constexpr int kMinBits = 2;
constexpr int kMaxBits = 8;

/// Bytes of one packed row of k codes.
CORA_HOST_DEVICE inline int64_t row_bytes(int64_t k, int bits) { return (k * bits + 7) / 8; }

/// Largest code: 2^bits - 1.
CORA_HOST_DEVICE inline int max_code(int bits) { return (1 << bits) - 1; }

/// Code i of a packed row.
CORA_HOST_DEVICE inline uint8_t get_code(const uint8_t* row, int64_t i, int bits) {
  const int64_t bit = i * bits;
  const int64_t byte = bit >> 3;
  const int shift = static_cast<int>(bit & 7);
  unsigned value = row[byte];
  if (shift + bits > 8) value |= static_cast<unsigned>(row[byte + 1]) << 8;
  return static_cast<uint8_t>((value >> shift) & static_cast<unsigned>(max_code(bits)));
}

/// Eight codes starting at a multiple of 8 are exactly `bits` bytes: loaded as one little-endian
/// integer, code j of the eight is at bit j*bits.
CORA_HOST_DEVICE inline uint64_t load_octet(const uint8_t* bytes, int bits) {
  uint64_t value = 0;
  for (int i = 0; i < bits; ++i) value |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return value;
}

CORA_HOST_DEVICE inline void store_octet(uint8_t* bytes, uint64_t value, int bits) {
  for (int i = 0; i < bits; ++i) bytes[i] = static_cast<uint8_t>(value >> (8 * i));
}

/// 0x0f0f... for 4 bits: the mask that spreads eight packed codes to eight bytes (pdep, pext).
constexpr uint64_t octet_mask(int bits) { return ((1u << bits) - 1) * 0x0101010101010101ull; }

}  // namespace cora

#define CORA_BITS_CASE(value, ...) \
  {                                \
    constexpr int kBits = (value); \
    __VA_ARGS__();                 \
    break;                         \
  }
/// Calls the body with `kBits` a constant: CORA_DISPATCH_BITS(bits, [&] { f<kBits>(...); }).
#define CORA_DISPATCH_BITS(bits, ...)       \
  switch (bits) {                           \
    case 2: CORA_BITS_CASE(2, __VA_ARGS__)  \
    case 3: CORA_BITS_CASE(3, __VA_ARGS__)  \
    case 4: CORA_BITS_CASE(4, __VA_ARGS__)  \
    case 5: CORA_BITS_CASE(5, __VA_ARGS__)  \
    case 6: CORA_BITS_CASE(6, __VA_ARGS__)  \
    case 7: CORA_BITS_CASE(7, __VA_ARGS__)  \
    default: CORA_BITS_CASE(8, __VA_ARGS__) \
  }
