// What:     W = scale * (code - zero) + B diag(s) A as a 16-bit matrix [n, k], for products of many rows: torch's own
//           matrix product then runs at full speed, and the adapter costs nothing there.
// Inputs:   parts of a prepared layer (layout.h) of one tap.
// Numerics: B's codes are exact in tf32, s A is rounded to it; sums float32; one rounding to the result.
// Method:   a warp owns a tile, 16 rows x 64 inputs. A's tiles of the block's inputs become tf32 in shared memory,
//           [rank][column], columns in the order in which a lane's accumulators meet its codes:
//             accumulators 2t, 2t + 1 of column tile 2 j + hi  <->  codes (j, h, 2 hi + 0..1)   (layout.h)
//           so each lane writes four neighbouring numbers.
// Cost:     bits / 8 B in and 2 B out a weight, 2 r products; bound by the writes up to rank 64 or so.
#include "cuda/dequantize.cuh"
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
  int32_t n, k;
  uint16_t* out;
};

template <typename T, int kBits>
CORA_GLOBAL(kThreads, 1) merge_tiles_kernel(const MergeArgs p) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, group = lane / 4, quad = lane % 4;
  const int block = static_cast<int>(blockIdx.x), panel = static_cast<int>(blockIdx.y) * kWarps + tid / 32;
  const int rank_tiles = p.parts.rank_tiles;
  uint32_t* const a = reinterpret_cast<uint32_t*>(shared_memory());
  const float* const adapter_scale = reinterpret_cast<const float*>(p.prepared + p.parts.adapter_scale);

  for (int i = tid; i < rank_tiles * 32; i += kThreads) {
    const int tile = i / 32, l = i % 32;
    Codes<8> codes;
    codes.read(reinterpret_cast<const char*>(p.prepared + p.parts.a_tiles) +
                   (static_cast<int64_t>(block) * rank_tiles + tile) * 1024, l);
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
  if (panel >= p.parts.panels) return;

  float acc[1][8][4] = {};
  for (int tile = 0; tile < rank_tiles; ++tile) {
    const uint2 b = load<uint2>(p.prepared + p.parts.b_tiles +
                                (static_cast<int64_t>(panel) * rank_tiles + tile) * 256 + lane * 8);
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
        for (int e = 0; e < 2; ++e)
          x[c][e] = a[(tile * 16 + quad * 4 + step * 2 + e) * kPitch + c * 8 + group];
      mma_tf32(acc, w, x);
    }
  }

  const int segment = block / p.walk.blocks_per_segment;
  const int first = (block - segment * p.walk.blocks_per_segment) * kTileInputs;
  Codes<kBits> codes;
  codes.read(reinterpret_cast<const char*>(p.prepared + p.parts.tiles) +
                 (static_cast<int64_t>(block) * p.parts.panels + panel) * (128 * kBits), lane);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = panel * kTileRows + group + 8 * h;
    const float2 q = load<float2>(reinterpret_cast<const float2*>(p.prepared + p.parts.qparams) +
                                  static_cast<int64_t>(segment) * p.parts.panels * kTileRows + row);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first + 16 * j + 4 * quad;  // within the segment
      if (row >= p.n || column >= p.walk.segment_channels) continue;
      const uint32_t bytes = codes.bytes(j, h);
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float code = static_cast<float>(bytes >> (8 * (i / 2 + 2 * (i % 2))) & 0xff);
        v[i] = q.x * (code - q.y) + acc[0][2 * j + i / 2][2 * h + i % 2];
      }
      store(p.out + static_cast<int64_t>(row) * p.k + segment * p.walk.segment_channels + column,
            uint2{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])});
    }
  }
}

template <typename T>
const char* launch_merge(int container, const MergeArgs& args, void* stream) {
  const Dim3 grid{static_cast<unsigned>(args.walk.blocks()),
                  static_cast<unsigned>((args.parts.panels + kWarps - 1) / kWarps), 1};
  const size_t bytes = static_cast<size_t>(args.parts.rank_tiles) * 16 * kPitch * sizeof(float);
  switch (container) {
    case 2: return launch(merge_tiles_kernel<T, 2>, grid, kThreads, bytes, stream, args);
    case 3: return launch(merge_tiles_kernel<T, 3>, grid, kThreads, bytes, stream, args);
    case 4: return launch(merge_tiles_kernel<T, 4>, grid, kThreads, bytes, stream, args);
    default: return launch(merge_tiles_kernel<T, 8>, grid, kThreads, bytes, stream, args);
  }
}

}  // namespace

bool merges_by_tiles(const LayerShape& s, int type) {
  return is_tiled(s) && taps_of(s) == 1 && s.channels / s.q_groups % 4 == 0 && type != kFloat32;
}

const char* merge_by_tiles(const LayerShape& s, const uint8_t* prepared, void* out, int type, void* stream) {
  const MergeArgs args{walk_of(s), parts_of(s), prepared, s.n, s.channels, static_cast<uint16_t*>(out)};
  return type == kFloat16 ? launch_merge<Half>(container_bits(s.bits), args, stream)
                          : launch_merge<Bfloat16>(container_bits(s.bits), args, stream);
}

}  // namespace cora::cuda
