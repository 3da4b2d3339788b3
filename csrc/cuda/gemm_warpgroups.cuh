// The GEMM on 8-bit codes by Hopper's own instructions (sm_90a): as gemm.cuh says, and the same bits, with these
// differences.
//
// Method:   a warp dequantizes a tile of 64 inputs to one of two sets of operand registers, whose two instructions are
//           a group: they run while the next tile is dequantized. x is read straight from the ring of stages, whose
//           rows lie as the instructions want them (chunk_of is the 128-byte swizzle). A stage is overwritten two
//           rounds after it was read, when every warp has waited for its instructions.
//           8-bit x lies inside its border, so no tap of a window falls outside: copies follow running pointers, whose
//           steps from tap to tap are computed once. Tokens beyond the last are copies of the last and not stored.
//           t of a fused adapter: by the warps' own instructions, meanwhile. With one rank tile, half of the warps
//           takes the first tile of a stage, half the second; with two, each half its rank tile; a warp a quarter of
//           the tokens.
//           t of a pass of its own: blocks share K, and add up their integers in memory, exact in whatever order.
#pragma once

#include "cuda/gemm.cuh"

namespace cora::cuda {

/// The next stage to be copied, as this thread sees it.
template <typename C>
struct StageCopies {
  static constexpr int kLoadRows = C::kXSums, kRowsApart = C::kThreads / 8;
  static constexpr int kChunks = C::kPanels * C::kTileBytes / 16;  // of 16 bytes, of a row of weight tiles

  const GemmArgs& p;
  int tid, block, end_block;
  uint32_t row[kLoadRows];  // where the windows begin in x, which plan() holds below 4 GB
  int place;                // of the chunk in a stage
  // The chunk's tap and channel: where they are, and how far from one stage to the next.
  int channel, tap, tap_x, channel_step, tap_step, tap_x_step;
  int64_t offset, offset_step, next_tap, next_row;  // bytes
  const uint8_t* weights;
  uint64_t weight_row;  // bytes of the tiles of 64 inputs
  int weight_chunks;    // ... that are ours to copy, 16 bytes each

  CORA_DEVICE StageCopies(const GemmArgs& args, int thread, int first_panel, int first_token, int begin, int end)
      : p(args), tid(thread), block(begin), end_block(end) {
    const int chunk = tid % 8;
    place = tid / 8 * 128 + chunk_of<C>(tid / 8, chunk) * 16;
#pragma unroll
    for (int i = 0; i < kLoadRows; ++i) {
      const int wanted = first_token + tid / 8 + i * kRowsApart, m = wanted < p.m ? wanted : p.m - 1;
      const Pixel pixel = pixel_of(p, m);
      row[i] = static_cast<uint32_t>(pixel.item * p.x_item + int64_t{pixel.y} * p.stride[0] * p.x_row +
                                     int64_t{pixel.x} * p.stride[1] * p.x_pixel);
    }
    const int run = p.walk.run;
    next_tap = p.dilation[1] * p.x_pixel - run;
    next_row = p.dilation[0] * p.x_row - p.kernel_w * p.dilation[1] * p.x_pixel;
    // k inputs on: so many taps, of these so many in the last row of taps, so many channels, so many bytes.
    const auto walk = [&](int k, int* taps, int* taps_x, int* channels) {
      *taps = static_cast<int>(quotient(static_cast<uint32_t>(k), p.run));
      const int rows = static_cast<int>(quotient(static_cast<uint32_t>(*taps), p.taps_w));
      *taps_x = *taps - rows * p.kernel_w;
      *channels = k - *taps * run;
      return *channels + *taps_x * p.dilation[1] * p.x_pixel + rows * p.dilation[0] * p.x_row;
    };
    offset = walk(begin * kTileInputs + chunk * 16, &tap, &tap_x, &channel);
    offset_step = walk(C::kTilesK * kTileInputs, &tap_step, &tap_x_step, &channel_step);

    const int panels = p.panels - first_panel < C::kPanels ? p.panels - first_panel : C::kPanels;
    weight_chunks = panels * (C::kTileBytes / 16);
    weight_row = static_cast<uint64_t>(p.panels) * C::kTileBytes;
    weights = p.w + begin * weight_row + static_cast<uint64_t>(first_panel) * C::kTileBytes + tid * 16;
  }

  /// Copies the next stage; beyond the end of K nothing.
  CORA_DEVICE void copy(char* stage, int fused_tiles) {
    if (block >= end_block) return;
    const char* const x = p.x + offset;
    const bool inside = tap < p.walk.taps && channel < p.walk.segment_channels;
#pragma unroll
    for (int i = 0; i < kLoadRows; ++i) async_copy16(stage + place + i * kRowsApart * 128, x + row[i], inside);
    channel += channel_step;
    tap += tap_step;
    tap_x += tap_x_step;
    offset += offset_step;
    if (channel >= p.walk.run) {
      channel -= p.walk.run;
      offset += next_tap;
      ++tap;
      ++tap_x;
    }
    if (tap_x >= p.kernel_w) {
      tap_x -= p.kernel_w;
      offset += next_row;
    }
    // What lies beyond the weight is not copied: its rows are not stored, and its inputs meet zeros of x.
#pragma unroll
    for (int tile = 0; tile < C::kTilesK; ++tile)
#pragma unroll
      for (int i = 0; i < kChunks; i += C::kThreads)
        if (i + tid < weight_chunks && block + tile < end_block)
          async_copy16(stage + C::kWeightAt + tile * C::kPanels * C::kTileBytes + (i + tid) * 16,
                       weights + tile * weight_row + i * 16);
    weights += C::kTilesK * weight_row;
    if constexpr (C::kFuses) {  // one or two rank tiles: a chunk a thread at most
      const int tiles = end_block - block < C::kTilesK ? end_block - block : C::kTilesK;
      if (tid < tiles * fused_tiles * 64)
        async_copy16(stage + C::kAdapterAt + tid * 16,
                     p.a + static_cast<int64_t>(block) * fused_tiles * 1024 + tid * 16);
    }
    block += C::kTilesK;
  }
};

/// The operands of a tile: codes - zero, in the order of x in memory.
template <typename C>
CORA_DEVICE void warpgroup_operands(const Codes<C::kBits>& codes, const RowParameters<C>& row, uint32_t (&w)[2][4]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    row.operand(codes, step, false, w[step]);
#pragma unroll
    for (int r = 0; r < 4; ++r) w[step][r] = byte_permute(w[step][r], 0, 0x3120u);
  }
}

/// t of a stage: see the top. warp: of the block.
template <typename C>
CORA_DEVICE void multiply_rank_tiles(const Block<C>& block, const char* stage, int fused_tiles,
                                     int32_t (&acc_t)[1][C::kRankCols][4]) {
  const int lane = block.lane, warp = block.tid / 32, half = warp / 4, first = warp % 4 * C::kRankCols * 8;
  const int rank_tile = fused_tiles == 2 ? half : 0;
  const int begin = fused_tiles == 2 ? 0 : half, end = fused_tiles == 2 ? 2 : half + 1;
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    Codes<8> codes;
    codes.read(stage + C::kAdapterAt + (tile * fused_tiles + rank_tile) * 1024, lane);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[1][4], x[C::kRankCols][2];
      block.adapter_bytes(codes, step, a);
#pragma unroll
      for (int r = 0; r < 4; ++r) a[0][r] = byte_permute(a[0][r], 0, 0x3120u);
#pragma unroll
      for (int j = 0; j < C::kRankCols; j += 2) {
        const int r = first + j * 8 + lane / 16 * 8 + lane % 8, chunk = tile * 4 + step * 2 + lane / 8 % 2;
        uint32_t v[4];
        load_matrices(v, stage + r * 128 + chunk_of<C>(r, chunk) * 16);
        x[j][0] = v[0];
        x[j][1] = v[1];
        x[j + 1][0] = v[2];
        x[j + 1][1] = v[3];
      }
      mma8(acc_t, a, x);
    }
  }
}

/// t, scaled, to shared memory as the operand of multiply_by_b: from the fused sums, or the pass before.
template <typename C>
CORA_DEVICE void place_t(const Block<C>& block, const int32_t (&acc_t)[1][C::kRankCols][4]) {
  const GemmArgs& p = block.p;
  const int pitch = C::t_pitch(p.rank_tiles), ranks = p.rank_tiles * 16;
  const bool fused = C::kFuses && p.fused;
  int32_t* const parts = reinterpret_cast<int32_t*>(block.shared + C::kBlockM * pitch);  // [half][token][16]
  if constexpr (C::kFuses)
    if (fused) {
      const int half = block.tid / 128, first = half * C::kBlockM + block.tid / 32 % 4 * C::kRankCols * 8;
#pragma unroll
      for (int j = 0; j < C::kRankCols; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          parts[(first + j * 8 + block.quad * 2 + e % 2) * 16 + block.group + 8 * (e / 2)] = acc_t[0][j][e];
      block_sync();
    }
  if (!fused) {
    // All under way at once, where the operand will be.
#pragma unroll 1
    for (int tile = 0; tile < p.rank_tiles; ++tile)
#pragma unroll 1
      for (int token = block.tid / 4; token < C::kBlockM; token += C::kThreads / 4) {
        const int m = block.first_token + token, rank = tile * 16 + block.tid % 4 * 4;
        async_copy16(block.shared + token * pitch + rank * 4,
                     p.t + static_cast<int64_t>(m < p.m ? m : 0) * ranks + rank);
      }
    async_commit();
    async_wait<0>();
    block_sync();
  }
  // A thread takes two ranks of each rank tile, and every so many tokens. Loops as they stand: y needs the registers.
#pragma unroll 1
  for (int rank = block.tid % 8 * 2; rank < ranks; rank += 16) {
    const float2 scale = load<float2>(p.adapter_scale + rank);
    const uint2 a_sums = load<uint2>(p.a_sums + rank);
#pragma unroll 1
    for (int token = block.tid / 8; token < C::kBlockM; token += C::kThreads / 8) {
      const int item = block.item_of(token);
      uint2 sum;
      if (fused) {
        sum = load<uint2>(parts + (rank / 16 * C::kBlockM + token) * 16 + rank % 16);
        if (p.rank_tiles == 1) {
          const uint2 other = load<uint2>(parts + (C::kBlockM + token) * 16 + rank);
          sum = uint2{sum.x + other.x, sum.y + other.y};
        }
      } else {
        sum = load<uint2>(block.shared + token * pitch + rank * 4);
      }
      const uint32_t zero = static_cast<uint32_t>(p.x_zero[item]);
      const float x_scale = p.x_scale[item];
      const float low = static_cast<float>(static_cast<int32_t>(sum.x - zero * a_sums.x)) * scale.x * x_scale;
      const float high = static_cast<float>(static_cast<int32_t>(sum.y - zero * a_sums.y)) * scale.y * x_scale;
      store(block.shared + token * pitch + rank * 4, uint2{round_tf32(low), round_tf32(high)});
    }
  }
  block_sync();
}

/// Four neighbouring channels as one piece of memory.
template <int kType>
CORA_DEVICE void store_four(const Epilogue& e, void* to, const float (&v)[4]) {
  if constexpr (kType == kFloat32) {
    store(to, float4{v[0], v[1], v[2], v[3]});
  } else if constexpr (kType == kUint8) {
    const float top = static_cast<float>(e.out_top), zero = static_cast<float>(e.out_zero);
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float q = rintf(v[i] * e.out_inverse) + zero;
      q = q > 0.0f ? q : 0.0f;
      codes |= static_cast<uint32_t>(q < top ? q : top) << (8 * i);
    }
    store(to, codes);
  } else if constexpr (kType == kFloat16) {
    store(to, uint2{pack2<Half>(v[0], v[1]), pack2<Half>(v[2], v[3])});
  } else {
    store(to, uint2{pack2<Bfloat16>(v[0], v[1]), pack2<Bfloat16>(v[2], v[3])});
  }
}

/// The tile of y, float32 [token][channel] in shared memory, to its place, by four channels of a token. kType: whole
/// pieces of this type; kAny: by elements.
constexpr int kAny = -1;
template <typename C, int kType>
CORA_DEVICE void store_fours(const GemmArgs& p, const float* y, int first_panel, int first_token) {
  constexpr int kFours = C::kBlockN / 4;
  const Epilogue& e = p.epilogue;
  const PixelStrides &s = e.out_strides, &a = e.add_strides;
  const int tid = reread_thread_index(), n = tid % kFours * 4, channel = first_panel * kTileRows + n;
  if (channel >= p.n) return;
  const float4 bias = load<float4>(p.bias + channel);
#pragma unroll 1  // as it stands: registers for what does not change in the loop would be too many
  for (int token = tid / kFours; token < C::kBlockM && first_token + token < p.m; token += C::kThreads / kFours) {
    const Pixel pixel = pixel_of(p, first_token + token);
    const float4 sum = load<float4>(y + token * C::kOutPitch + n);
    float v[4] = {sum.x + bias.x, sum.y + bias.y, sum.z + bias.z, sum.w + bias.w};
    const int64_t out = place_in(s, pixel) + channel * s.channel;
    const int64_t add = e.add == nullptr ? 0 : place_in(a, pixel) + channel * a.channel;
    if constexpr (kType == kAny) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (channel + i < p.n) finish_element(e, v[i], out + i * s.channel, add + i * a.channel);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = add_and_clamp(e, v[i], add + i * a.channel);
      constexpr int kSize = kType == kFloat32 ? 4 : kType == kUint8 ? 1 : 2;
      store_four<kType>(e, static_cast<char*>(e.out) + out * kSize, v);
    }
  }
}
template <typename C>
CORA_DEVICE void store_by_type(const GemmArgs& p, const float* y, int first_panel, int first_token) {
  const Epilogue& e = p.epilogue;
  const PixelStrides& s = e.out_strides;
  const int size = e.out_type == kFloat32 ? 4 : e.out_type == kUint8 ? 1 : 2;
  const bool whole = s.channel == 1 && (s.pixel | s.row | s.item | p.n) % 4 == 0 &&
                     (e.out_type != kUint8 || e.out_inverse != 0.0f) &&
                     reinterpret_cast<uintptr_t>(e.out) % static_cast<unsigned>(4 * size) == 0;
  if (!whole)
    store_fours<C, kAny>(p, y, first_panel, first_token);
  else if (e.out_type == kUint8)
    store_fours<C, kUint8>(p, y, first_panel, first_token);
  else if (e.out_type == kFloat32)
    store_fours<C, kFloat32>(p, y, first_panel, first_token);
  else if (e.out_type == kFloat16)
    store_fours<C, kFloat16>(p, y, first_panel, first_token);
  else
    store_fours<C, kBfloat16>(p, y, first_panel, first_token);
}

template <typename C>
CORA_DEVICE bool compute_by_warpgroups(const GemmArgs& p, int round) {
  const Piece piece = piece_of(p.shares, round);
  const int fused_tiles = C::kFuses && p.fused ? p.rank_tiles : 0;
  const int stage_bytes = C::kAdapterAt + C::kTilesK * fused_tiles * 1024;
  const int begin = piece.begin * C::kTilesK;
  const int end = piece.end == p.shares.stages ? p.walk.blocks() : piece.end * C::kTilesK;

  Block<C> block(p, piece.tile, end);
  const int lane = block.lane, quad = block.quad, group = block.group, warp = block.tid / 32;
  const int panel = block.panel_of(0);
  char* const shared = block.shared;
  StageCopies<C> copies(p, block.tid, block.first_panel, block.first_token, begin, end);
#pragma unroll 1
  for (int s = 0; s < C::kAhead; ++s) {
    copies.copy(shared + s * stage_bytes, fused_tiles);
    async_commit();
  }

  // Whether some row of the block needs the sums of x, as every warp shall know after the first barrier.
  RowParameters<C> row;
  int* const flags = reinterpret_cast<int*>(shared + C::kStages * stage_bytes);
  {
    int left_over = row.set(0, block.qparams_of(0, block.warp_n, 0), p.bits);
    left_over |= row.set(1, block.qparams_of(0, block.warp_n, 1), p.bits);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) left_over |= shuffle_xor(left_over, mask);
    if (lane == 0) store(flags + warp, left_over);
  }
  bool sum_x = false;

  // --- The loop over K ---
  int32_t acc[1][C::kCols][4] = {};
  int32_t acc_t[1][C::kRankCols][4] = {};
  int32_t x_sum[C::kXSums] = {};  // this thread's chunks of every row it copies
  uint32_t w[C::kTilesK][2][4];
  const int weight_at = C::kWeightAt + block.warp_n * C::kTileBytes, x_at = block.warp_m * C::kCols * 1024;
  int stage = 0, free = C::kAhead;
#pragma unroll 1
  for (int k = begin; k < end; k += C::kTilesK) {
    async_wait<C::kAhead - 1>();
    warpgroup_publish();
    block_sync();
    const char* const from = shared + stage * stage_bytes;
    // No branch between these: the assembler would have each group wait for the one before. Tiles beyond the end of K
    // hold zeros for x, and anything for the weights.
#pragma unroll
    for (int tile = 0; tile < C::kTilesK; ++tile) {
      Codes<C::kBits> codes;
      codes.read(from + weight_at + tile * C::kPanels * C::kTileBytes, lane);
      warpgroup_wait<1>();  // the group before the last: its weights were in w[tile]
      warpgroup_operands<C>(codes, row, w[tile]);
      warpgroup_arrive();
#pragma unroll
      for (int step = 0; step < 2; ++step) warpgroup_mma8(acc, w[tile][step], from + x_at + (tile * 2 + step) * 32);
      warpgroup_commit();
    }
    copies.copy(shared + free * stage_bytes, fused_tiles);
    async_commit();
    if constexpr (C::kFuses)
      if (fused_tiles > 0) multiply_rank_tiles<C>(block, from, fused_tiles, acc_t);
    if (k == begin) {
      int any = 0;
#pragma unroll
      for (int i = 0; i < C::kThreads / 32; ++i) any |= load<int>(flags + i);
      sum_x = any != 0;
    }
    if (sum_x)
#pragma unroll
      for (int i = 0; i < C::kXSums; ++i) {
        const uint4 v = load<uint4>(from + copies.place + i * StageCopies<C>::kRowsApart * 128);
        x_sum[i] = add_bytes({v.x, v.y}, add_bytes({v.z, v.w}, x_sum[i]));
      }
    stage = stage == C::kStages - 1 ? 0 : stage + 1;
    free = free == C::kStages - 1 ? 0 : free + 1;
  }
  warpgroup_wait<0>();
#pragma unroll
  for (int j = 0; j < C::kCols; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) warpgroup_settle(acc[0][j][e]);
  async_wait<0>();
  block_sync();  // from here on the ring is free

  // --- x A^T of a pass of its own ends here ---
  if (p.t_out != nullptr) {
    const int ranks = p.panels * kTileRows;
#pragma unroll
    for (int j = 0; j < C::kCols; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = block.first_token + block.token_of(j, e % 2), r = panel * kTileRows + group + 8 * (e / 2);
        if (m < p.m && panel < p.panels)
          atomic_add(reinterpret_cast<unsigned*>(p.t_out) + static_cast<int64_t>(m) * ranks + r,
                     static_cast<unsigned>(acc[0][j][e]));
      }
    return true;
  }
  if (p.early) wait_for_launch_before();

  if ((piece.begin > 0 || piece.end < p.shares.stages) && !add_up_parts<C>(block, piece, acc, x_sum, acc_t))
    return piece.last;

  // --- Sums of x - zero_x: from the threads that copied them to those that want them ---
  int* const sums = reinterpret_cast<int*>(shared);
  if (sum_x) {
#pragma unroll
    for (int i = 0; i < C::kXSums; ++i) {
      int sum = x_sum[i];
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
      if (block.tid % 8 == 0) store(sums + block.tid / 8 + i * StageCopies<C>::kRowsApart, sum);
    }
    block_sync();
  }

  // --- Scale: the integers, sums of (x - zero_x) (code - zero), exact ---
  float y[1][C::kCols][4], scale[2];
  int32_t left_over[2], code_sums[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 q = block.qparams_of(0, block.warp_n, h);
    scale[h] = q.x;
    left_over[h] = row.set(h, q, p.bits);
    code_sums[h] = panel < p.panels ? load<int32_t>(p.sums + panel * kTileRows + group + 8 * h) : 0;
  }
  const int32_t count = p.walk.taps * p.walk.segment_channels;
  const bool one_item = p.x_parameters == 1;
  const int32_t first_zero = p.x_zero[0];
  const float first_scale = p.x_scale[0];
  if (one_item && !sum_x) {  // as a rule: straight code is fetched at a price, so let it be short
#pragma unroll
    for (int j = 0; j < C::kCols; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        y[0][j][i] = scale[i / 2] * static_cast<float>(acc[0][j][i] - first_zero * code_sums[i / 2]) * first_scale;
  } else {
#pragma unroll
    for (int j = 0; j < C::kCols; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = block.token_of(j, e);
        int32_t zero_x = first_zero;
        float scale_x = first_scale;
        if (!one_item) {
          const int item = block.item_of(token);
          zero_x = p.x_zero[item];
          scale_x = p.x_scale[item];
        }
        const int64_t sum = sum_x ? load<int>(sums + token) - zero_x * count : 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int32_t near = acc[0][j][2 * h + e] - zero_x * code_sums[h];
          y[0][j][2 * h + e] =
              scale[h] * (sum_x ? static_cast<float>(near + left_over[h] * sum) : static_cast<float>(near)) * scale_x;
        }
      }
  }
  if (sum_x) block_sync();  // the sums are read

  if (p.rank_tiles > 0) {
    place_t<C>(block, acc_t);
    multiply_by_b<C>(block, y);
  }

  float* const out = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int j = 0; j < C::kCols; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      out[block.token_of(j, e % 2) * C::kOutPitch + block.warp_n * kTileRows + group + 8 * (e / 2)] = y[0][j][e];
  block_sync();
  store_by_type<C>(p, out, block.first_panel, block.first_token);
  return piece.last;
}

}  // namespace cora::cuda
