// What:     W = scale * (code - zero) + B diag(s) A as 16-bit numbers [n, kernel height, kernel width, channels], as a
//           matrix or a channels-last filter lies, for calls of many rows or pixels: torch's own operators then run at
//           full speed, and the adapter costs nothing there.
// Inputs:   parts of a prepared layer (layout.h). The tiles' inputs go [segment][tap][channel], so 16 neighbours are 16
//           channels of a tap: 32 bytes of the result.
// Numerics: B's codes are exact in tf32, s A is rounded to it; sums float32; one rounding to the result.
// Method:   a warp owns a tile, 16 rows x 64 inputs. A's tiles of the block's inputs become tf32 in shared memory,
//           [rank][column], columns in the order in which a lane's accumulators meet its codes:
//             accumulators 2t, 2t + 1 of column tile 2 j + hi  <->  codes (j, h, 2 hi + 0..1)   (layout.h)
//           so each lane writes four neighbouring numbers (one by one where the channels are no multiple of four).
//           All it reads of its tile is under way before A is waited for: a small layer takes one latency of memory.
// Cost:     bits / 8 B in and 2 B out a weight, 2 r products; bound by the writes up to rank 64 or so.
#include "cuda/dequantize.cuh"
#include "cuda/elements.cuh"
#include "cuda/prepare.cuh"

namespace cora::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
/// Words of a rank in shared memory. A read's lane 4g + t takes rank 4t, column g: 280t + g, a bank each.
constexpr int kPitch = kTileInputs + 6;

struct MergeArgs {
  Walk walk;
  Parts parts;
  const uint8_t* prepared;
  FastDivide run;
  int32_t n, channels;
  uint16_t *out, *bias;  // bias: null if not wanted
};

/// kWhole: all rows of the result begin at a multiple of four.
template <typename T, int kBits, bool kWhole>
CORA_GLOBAL(kThreads, 4)
merge_tiles_kernel(const MergeArgs p) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, group = lane / 4, quad = lane % 4;
  const int block = static_cast<int>(blockIdx.x), panel = static_cast<int>(blockIdx.y) * kWarps + tid / 32;
  const int rank_tiles = p.parts.rank_tiles;
  uint32_t* const a = reinterpret_cast<uint32_t*>(shared_memory());
  const float* const adapter_scale = reinterpret_cast<const float*>(p.prepared + p.parts.adapter_scale);
  const int segment = block / p.walk.blocks_per_segment;

  // Warps beyond the last panel read its tile, and write nothing.
  const int64_t tile_panel = panel < p.parts.panels ? panel : p.parts.panels - 1;
  Codes<kBits> codes;
  codes.read(reinterpret_cast<const char*>(p.prepared + p.parts.tiles) +
                 (static_cast<int64_t>(block) * p.parts.panels + tile_panel) * (128 * kBits),
             lane);
  float2 q[2];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    q[h] = load<float2>(reinterpret_cast<const float2*>(p.prepared + p.parts.qparams) +
                        (segment * static_cast<int64_t>(p.parts.panels) + tile_panel) * kTileRows + group + 8 * h);
  const uint8_t* const b_tiles = p.prepared + p.parts.b_tiles + tile_panel * rank_tiles * 256 + lane * 8;
  uint2 next_b = rank_tiles > 0 ? load<uint2>(b_tiles) : uint2{0, 0};

  for (int i = tid; i < rank_tiles * 32; i += kThreads) {
    const int tile = i / 32, l = i % 32;
    Codes<8> codes;
    codes.read(reinterpret_cast<const char*>(p.prepared + p.parts.a_tiles) +
                   (static_cast<int64_t>(block) * rank_tiles + tile) * 1024,
               l);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = tile * 16 + l / 4 + 8 * h;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t bytes = codes.bytes(j, h);  // of inputs 0, 2, 1, 3
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int hi = b % 2, e = b / 2, code = static_cast<int>(bytes >> (8 * b) & 0xff) - 128;
          a[r * kPitch + (2 * j + hi) * 8 + 2 * (l % 4) + e] = round_tf32(static_cast<float>(code) * adapter_scale[r]);
        }
      }
    }
  }
  block_sync();
  if (block == 0 && p.bias != nullptr) {
    const int row = static_cast<int>(blockIdx.y) * (kWarps * kTileRows) + tid;
    if (tid < kWarps * kTileRows && row < p.n) {
      const float bias = reinterpret_cast<const float*>(p.prepared + p.parts.bias)[row];
      p.bias[row] = static_cast<uint16_t>(pack2<T>(bias, bias));
    }
  }
  if (panel >= p.parts.panels) return;

  float acc[1][8][4] = {};
  for (int tile = 0; tile < rank_tiles; ++tile) {
    const uint2 b = next_b;
    if (tile + 1 < rank_tiles) next_b = load<uint2>(b_tiles + (tile + 1) * 256);
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // ranks 4t + 2 step, + 1 are inputs t and t + 4 of the instruction
      uint32_t w[1][4], x[8][2];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t word = r % 2 ? b.y : b.x;
        w[0][r] = float_to_bits(static_cast<float>(static_cast<int>(word >> (8 * (step + 2 * (r / 2))) & 0xff) - 128));
      }
#pragma unroll
      for (int c = 0; c < 8; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e) x[c][e] = a[(tile * 16 + quad * 4 + step * 2 + e) * kPitch + c * 8 + group];
      mma_tf32(acc, w, x);
    }
  }

  const int first = (block - segment * p.walk.blocks_per_segment) * kTileInputs;  // within the segment
  int tap = static_cast<int>(quotient(static_cast<uint32_t>(first), p.run)), channel = first - tap * p.walk.run;
  int at = tap * p.channels + channel;                  // within a filter, less what the segment and the lane add
  const int left = p.walk.segment_channels - 4 * quad;  // of a run, from the lane's first channel on
  const int row = panel * kTileRows + group;
  uint16_t* const out =
      p.out + static_cast<int64_t>(row) * p.walk.taps * p.channels + segment * p.walk.segment_channels + 4 * quad;
  uint16_t* const outs[2] = {out, out + static_cast<int64_t>(8) * p.walk.taps * p.channels};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (tap < p.walk.taps && channel < left)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (row + 8 * h >= p.n) continue;
        const uint32_t bytes = codes.bytes(j, h);  // of inputs 0, 2, 1, 3
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // A byte below 2^23 is that and the code: cheaper than a conversion.
          const uint32_t selector = 0x7440u + static_cast<uint32_t>(i / 2 + 2 * (i % 2));
          const float code = bits_to_float(byte_permute(bytes, 0x4b000000u, selector)) - 8388608.0f;
          v[i] = fused_multiply_add(q[h].x, code - q[h].y, acc[0][2 * j + i / 2][2 * h + i % 2]);
        }
        const uint2 packed{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])};
        if constexpr (kWhole) {
          // One number: of a pair of words nvcc makes two stores in places.
          store(outs[h] + at, packed.x | static_cast<uint64_t>(packed.y) << 32);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (channel + i < left)
              store(outs[h] + at + i, static_cast<uint16_t>((i / 2 ? packed.y : packed.x) >> (16 * (i % 2))));
        }
      }
    channel += kRunAlign;
    at += kRunAlign;
    if (channel == p.walk.run) channel = 0, at += p.channels - p.walk.run, ++tap;
  }
}

template <typename T, int kBits>
const char* launch_merge(const MergeArgs& args, void* stream) {
  const Dim3 grid{static_cast<unsigned>(args.walk.blocks()),
                  static_cast<unsigned>((args.parts.panels + kWarps - 1) / kWarps), 1};
  const size_t bytes = static_cast<size_t>(args.parts.rank_tiles) * 16 * kPitch * sizeof(float);
  return launch(args.channels % 4 == 0 ? merge_tiles_kernel<T, kBits, true> : merge_tiles_kernel<T, kBits, false>, grid,
                kThreads, bytes, stream, args);
}

template <typename T>
const char* merge_container(int container, const MergeArgs& args, void* stream) {
  switch (container) {
    case 2: return launch_merge<T, 2>(args, stream);
    case 3: return launch_merge<T, 3>(args, stream);
    case 4: return launch_merge<T, 4>(args, stream);
    default: return launch_merge<T, 8>(args, stream);
  }
}

}  // namespace

const char* merge_by_tiles(const LayerShape& s, const uint8_t* prepared, void* out, void* bias, int type,
                           void* stream) {
  const Walk walk = walk_of(s);
  const MergeArgs args{walk,
                       parts_of(s),
                       prepared,
                       fast_divide(walk.run),
                       s.n,
                       s.channels,
                       static_cast<uint16_t*>(out),
                       static_cast<uint16_t*>(bias)};
  return type == kFloat16 ? merge_container<Half>(container_bits(s.bits), args, stream)
                          : merge_container<Bfloat16>(container_bits(s.bits), args, stream);
}

}  // namespace cora::cuda
