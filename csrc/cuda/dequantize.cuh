// Weights in registers: a lane's codes of a tile (layout.h), and their way to operands of the tensor cores.
#pragma once

#include "cuda/layout.h"
#include "cuda/platform.cuh"

#include <type_traits>

namespace cora::cuda {

/// A lane's codes of one tile, and their way to mma operands.
template <int kBits>
struct Codes {
  static constexpr int kWords = kBits;  // 32 codes
  uint32_t word[kWords];

  /// tile: a pointer, or an address in shared memory.
  template <typename Place>
  CORA_DEVICE void read(Place tile, int lane) {
    if constexpr (kBits == 4) {
      set(load<uint4>(tile + lane * 16), 0);
    } else if constexpr (kBits == 8) {
      set(load<uint4>(tile + lane * 16), 0);
      set(load<uint4>(tile + 512 + lane * 16), 4);
    } else {
      const uint2 low = load<uint2>(tile + lane * 8);
      word[0] = low.x;
      word[1] = low.y;
      if constexpr (kBits == 3) word[2] = load<uint32_t>(tile + 256 + lane * 4);
    }
  }
  /// 8 bits: only the words of inputs 16j ..: registers for two, not eight.
  CORA_DEVICE void read_step(const char* tile, int lane, int j) {
    const uint2 v = load<uint2>(tile + j / 2 * 512 + lane * 16 + j % 2 * 8);
    word[4 * (j / 2) + 2 * (j % 2)] = v.x;
    word[4 * (j / 2) + 2 * (j % 2) + 1] = v.y;
  }
  CORA_DEVICE void set(uint4 v, int at) {
    word[at] = v.x;
    word[at + 1] = v.y;
    word[at + 2] = v.z;
    word[at + 3] = v.w;
  }

  /// Bytes of row half h at inputs 16j + 4t + (0, 2, 1, 3).
  CORA_DEVICE uint32_t bytes(int j, int h) const {
    if constexpr (kBits == 8) return word[4 * (j / 2) + 2 * (j % 2) + h];
    if constexpr (kBits == 4) return (word[j] >> (4 * h)) & 0x0f0f0f0fu;
    uint32_t v = (word[j / 2] >> (2 * (2 * (j % 2) + h))) & 0x03030303u;
    if constexpr (kBits == 3) v |= ((word[2] >> (2 * j + h)) & 0x01010101u) << 2;
    return v;
  }
  /// The same with the top bit of each set, which costs nothing below 8 bits.
  CORA_DEVICE uint32_t topped_bytes(int j, int h) const {
    constexpr uint32_t kTop = 0x80808080u;
    if constexpr (kBits == 8) return bytes(j, h) | kTop;
    if constexpr (kBits == 4) return and_or(word[j] >> (4 * h), 0x0f0f0f0fu, kTop);
    const uint32_t v = and_or(word[j / 2] >> (2 * (2 * (j % 2) + h)), 0x03030303u, kTop);
    if constexpr (kBits == 2) return v;
    const int down = 2 * j + h - 2;
    return and_or(down >= 0 ? word[kBits - 1] >> (down & 31) : word[kBits - 1] << (-down & 31), 0x04040404u, v);
  }
};

/// code -> code - zero in T: an exponent is OR-ed over the code, which makes it kBase + code * 2^kShift, and one
/// fma takes both away. Row half h reads its codes where they lie, h fields up, so as not to shift them down
/// (Bfloat16 has too few digits for that with 4 bits).
template <typename T, int kBits>
struct Dequantize {
  static constexpr bool kHalf = std::is_same_v<T, Half>;
  static constexpr uint32_t kMagic = kHalf ? 0x64006400u : 0x43004300u;  // 1024, 128
  static constexpr int kField = kBits == 4 ? (kHalf ? 4 : 0) : kBits == 8 ? 0 : 2;

  static CORA_DEVICE float base(int h) { return (kHalf ? 1024.0f : 128.0f) / static_cast<float>(1 << (kField * h)); }
  static CORA_DEVICE uint32_t factor(int h) {
    const float f = 1.0f / static_cast<float>(1 << (kField * h));
    return pack2<T>(f, f);
  }

  /// Half ends at 65504: a zero-point far beyond the codes is brought to 32768, and the scale takes the rest; what the
  /// codes then still add is below Half's precision of the weight.
  static constexpr float kFarthest = 32768.0f;
  static CORA_DEVICE bool is_far(float zero_point) {
    return kHalf && (zero_point > kFarthest || zero_point < -kFarthest);
  }
  static CORA_DEVICE void bring_near(float& scale, float& zero_point) {
    if (!is_far(zero_point)) return;
    const float limit = zero_point > 0 ? kFarthest : -kFarthest;
    scale *= (zero_point > 0 ? zero_point : -zero_point) * (1.0f / kFarthest);
    zero_point = limit;
  }
  /// The zero-point of a row, not far, as fma's addend.
  static CORA_DEVICE uint32_t zero(float zero_point, int h) {
    const float c = -base(h) - zero_point;
    return pack2<T>(c, c);
  }

  /// The operand of inputs 16j.. 16j + 15. zero: as above; zero_float: the plain zero-points (Bfloat16, 8 bits).
  static CORA_DEVICE void operand(const Codes<kBits>& codes, int j, const uint32_t (&zero)[2],
                                  const float (&zero_float)[2], uint32_t (&out)[4]) {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t v = 0;
        if constexpr (kBits == 8 && !kHalf) {
          // 255 needs eight digits: through float32, whose 2^23 takes the byte.
          const uint32_t w = codes.bytes(j, h);
          const float low = bits_to_float(byte_permute(w, 0x4b000000u, hi ? 0x7441u : 0x7440u));
          const float high = bits_to_float(byte_permute(w, 0x4b000000u, hi ? 0x7443u : 0x7442u));
          out[2 * hi + h] = pack2<T>(low - 8388608.0f - zero_float[h], high - 8388608.0f - zero_float[h]);
          continue;
        } else if constexpr (kBits == 8) {
          v = byte_permute(codes.bytes(j, h), 0x64646464u, hi ? 0x4341u : 0x4240u);
        } else if constexpr (kBits == 4) {
          const int down = 8 * hi + 4 * h - kField * h;
          v = and_or(codes.word[j] >> down, 0x000f000fu << (kField * h), kMagic);
        } else {
          v = and_or(codes.word[j / 2] >> (8 * hi + 4 * (j % 2)), 0x00030003u << (2 * h), kMagic);
          if constexpr (kBits == 3) {
            const int down = 8 * hi + 2 * j + h - (2 * h + 2);
            const uint32_t high = down >= 0 ? codes.word[2] >> (down & 31) : codes.word[2] << (-down & 31);
            v = and_or(high, 0x00040004u << (2 * h), v);
          }
        }
        out[2 * hi + h] = fma2<T>(v, factor(h), zero[h]);
      }
  }
};

/// Bytes code - zero, two's complement, of row half h at inputs 16j + 4t + (0, 2, 1, 3); zero replicated four times.
template <int kBits>
CORA_DEVICE uint32_t subtract_bytes(const Codes<kBits>& codes, int j, int h, uint32_t zero) {
  constexpr uint32_t kTop = 0x80808080u;
  if constexpr (kBits < 8)
    return (codes.topped_bytes(j, h) - zero) ^ kTop;  // 128 + code - zero is 0..255: no byte borrows
  else
    return (codes.topped_bytes(j, h) - (zero & ~kTop)) ^ ((codes.bytes(j, h) ^ ~zero) & kTop);
}

/// Adapter codes (stored + 128) as a 16-bit operand.
template <typename T>
CORA_DEVICE void adapter_operand(const Codes<8>& codes, int step, uint32_t (&out)[4]) {
  const float zero_float[2] = {128.0f, 128.0f};
  const uint32_t zero[2] = {Dequantize<T, 8>::zero(128.0f, 0), Dequantize<T, 8>::zero(128.0f, 1)};
  Dequantize<T, 8>::operand(codes, step, zero, zero_float, out);
}

/// Scale and zero-point of a lane's two rows of a tile, in the form the operands take them.
template <typename C>
struct RowParameters {
  float scale[2], zero_float[2];
  uint32_t zero[2], scale16[2];

  /// Int8: what nearest_zero leaves over of the zero-point; the rest of q is wanted only after the loop.
  CORA_DEVICE int set(int h, float2 q, int bits) {
    if constexpr (C::kInt8) {
      const int near = nearest_zero(static_cast<int>(q.y), bits);
      zero[h] = static_cast<uint32_t>(C::kBits == 8 ? near & 0xff : near) * 0x01010101u;
      return near - static_cast<int>(q.y);
    } else {
      Dequantize<typename C::T, C::kBits>::bring_near(q.x, q.y);
      set_near(h, q);
      return 0;
    }
  }

  /// Both rows, 16-bit x. Far zero-points are rare: one vote of the warp instead of a choice for each.
  CORA_DEVICE void set_both(float2 low, float2 high) {
    using Codec = Dequantize<typename C::T, C::kBits>;
    if (Codec::kHalf && warp_any(Codec::is_far(low.y) || Codec::is_far(high.y))) {
      Codec::bring_near(low.x, low.y);
      Codec::bring_near(high.x, high.y);
    }
    set_near(0, low);
    set_near(1, high);
  }

  /// 16-bit x; the zero-point is not far.
  CORA_DEVICE void set_near(int h, float2 q) {
    scale[h] = q.x;
    zero_float[h] = q.y;
    zero[h] = Dequantize<typename C::T, C::kBits>::zero(q.y, h);
    scale16[h] = pack2<typename C::T>(q.x, q.x);
  }

  CORA_DEVICE void operand(const Codes<C::kBits>& codes, int step, bool scaled, uint32_t (&out)[4]) const {
    if constexpr (C::kInt8) {
#pragma unroll
      for (int r = 0; r < 4; ++r) out[r] = subtract_bytes<C::kBits>(codes, 2 * step + r / 2, r % 2, zero[r % 2]);
    } else {
      Dequantize<typename C::T, C::kBits>::operand(codes, step, zero, zero_float, out);
      if (scaled) {
#pragma unroll
        for (int r = 0; r < 4; ++r) out[r] = fma2<typename C::T>(out[r], scale16[r % 2], 0x80008000u);
      }
    }
  }
};

}  // namespace cora::cuda
