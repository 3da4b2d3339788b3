// What:     y = x W^T + (x A^T) B^T + bias for a packed weight W and an int8 adapter, x a matrix or the windows of a
//           convolution (implicit GEMM: K = taps x channels, x channels-last). W enters the tensor cores as their
//           first operand, x as the second: a token (or pixel) fills 1/8 of an instruction, not 1/16, which is what
//           decoding one token at a time wants, and weights go from the tile straight to the registers of one warp.
// Inputs:   x 16-bit or 8-bit codes, 16-byte aligned pixels; W, A, B, scales: parts of a prepared layer (layout.h).
// Numerics: 16-bit x: weights become code - zero in x's type, sums float32, scaled in float32. With scale groups and
//           more than 32 tokens the weights are scaled instead, in x's type.
//           8-bit x: int32 sums of products of integers, exact; scaled in float32. B sees t = x A^T rounded to x's type
//           (8-bit x: to tf32). Every sum has a fixed order: the same call gives the same bits.
// Method:   a block owns kBlockN channels x kBlockM tokens. A ring of kStages stages is filled by cp.async, one
//           commit a stage; waiting for all but kAhead - 1 and one barrier make the oldest stage readable and the
//           one read before it free. Rows of x are 128 bytes, their 16-byte chunks permuted by the row (see
//           chunk_of) so that neither the copies nor the reads conflict.
//           The adapter: `fused` computes t in the same loop from the same stages (the four warps along N share the
//           work: rank tile w % tiles, each its own share of the inputs); otherwise t comes in as partial sums of an
//           earlier pass. Then B t is ceil(r / 16) more steps on the same accumulators, before they are stored.
//           Few tokens of 16-bit x: see multiply_by_stream (gemm_stream.cuh).
//           Tiles of warpgroups (sm_90a, 8-bit x): gemm_warpgroups.cuh.
//           stream-K: where tiles of y do not fill the card evenly, blocks of threads share the stages of all tiles
//           evenly, whole tiles or parts. Who computes a part leaves its accumulators in `partial`; the last to arrive
//           at a tile adds them up in order. Nobody waits for anybody.
// Cost:     W once per kBlockM tokens, x once per kBlockN channels; see docs/cuda.md for bytes and occupancy.
#pragma once

#include "cuda/gemm_stream.cuh"

namespace cora::cuda {

// --- The loop over K -----------------------------------------------------------------------------------------------

/// By the instructions that every GPU has: a warp multiplies kRows x kCols tiles. end_segment(i) is called after the
/// last tile of scale group i (8-bit x).
template <typename C, typename EndSegment>
CORA_DEVICE void multiply_by_warps(Block<C>& block, RowParameters<C> (&rows)[C::kRows], int begin, int end,
                                   int stage_bytes, int fused_tiles, bool segmented, bool sum_x,
                                   typename Block<C>::Acc (&acc)[C::kRows][C::kCols][4],
                                   typename Block<C>::Acc (&acc_t)[1][C::kRankCols][4], int32_t (&x_sum)[C::kCols],
                                   const EndSegment& end_segment) {
  using T = typename C::T;
  constexpr int kSteps = C::kInt8 ? 2 : 4;  // mma steps of a tile along K
  const int lane = block.lane, group = block.group, warp_n = block.warp_n;
  // Fused tiles are 1, 2 or 4; the warps that share one take its steps in turn.
  const int shift = fused_tiles / 2, turns = C::kWarpsN >> shift, turn = warp_n >> shift;
  const int rank_tile_at = C::kAdapterAt + (warp_n - (turn << shift)) * 1024;
  int stage = 0, segment = 0, segment_end = begin + block.p.walk.blocks_per_segment;
  for (int k = begin; k < end; k += C::kTilesK) {
    const char* const from = block.next_stage(k, stage, stage_bytes);
#pragma unroll
    for (int tile = 0; tile < C::kTilesK; ++tile) {
      if (k + tile >= end) break;
      Codes<C::kBits> codes[C::kRows];
#pragma unroll
      for (int i = 0; i < C::kRows; ++i) {
        codes[i].read(from + C::kWeightAt + (tile * C::kPanels + warp_n * C::kRows + i) * C::kTileBytes, lane);
        if (segmented)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            rows[i].set(h,
                        load<float2>(from + C::kScaleAt + tile * C::kBlockN * 8 +
                                     ((warp_n * C::kRows + i) * kTileRows + group + 8 * h) * 8),
                        block.p.bits);
      }
      const char* const rank_tile = from + rank_tile_at + tile * fused_tiles * 1024;
      [[maybe_unused]] Codes<8> rank_codes;
      if constexpr (C::kInt8) {
        if (fused_tiles > 0) rank_codes.read(rank_tile, lane);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t x[C::kCols][2], w[C::kRows][4];
        block.read_x(from, tile, step, x);
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) rows[i].operand(codes[i], step, segmented, w[i]);
        if constexpr (C::kInt8) {
          mma8(acc, w, x);
          if (sum_x)
#pragma unroll
            for (int j = 0; j < C::kCols; ++j) x_sum[j] = add_bytes(x[j], x_sum[j]);
        } else {
          mma16<T>(acc, w, x);
        }
        if constexpr (C::kFuses) {
          if (fused_tiles > 0 && ((tile * kSteps + step) & (turns - 1)) == turn) {
            uint32_t a[1][4];
            if constexpr (C::kInt8) {
              block.adapter_bytes(rank_codes, step, a);
              mma8(acc_t, a, x);
            } else {
              Codes<8> step_codes;
              step_codes.read_step(rank_tile, lane, step);
              adapter_operand<T>(step_codes, step, a[0]);
              mma16<T>(acc_t, a, x);
            }
          }
        }
      }
      if (C::kInt8 && segmented && k + tile + 1 == segment_end) {
        end_segment(segment++);
        segment_end += block.p.walk.blocks_per_segment;
      }
    }
    stage = stage == C::kStages - 1 ? 0 : stage + 1;
  }
}

// --- After the loop --------------------------------------------------------------------------------------------------

/// Stages begin .. end - 1 of a tile of y; whether it is the last of its block of threads.
struct Piece {
  int tile, begin, end;
  bool last;
};

/// The piece of number `round` of this block of threads. The block is reread: a piece is found again after the loop
/// over K rather than kept in registers around it.
CORA_DEVICE Piece piece_of(const Shares& shares, int round) {
  const int worker = reread_block_index();
  if (shares.each == 0) {
    const auto tile = static_cast<int>(quotient(static_cast<uint32_t>(worker), shares.by_splits));
    const int split = worker - tile * shares.splits;
    const auto stage = [&](int i) {  // splits are few
      return static_cast<int>(quotient(static_cast<uint32_t>(shares.stages * i), shares.by_splits));
    };
    return {tile, stage(split), stage(split + 1), true};
  }
  const int first = shares.begin(worker), after = shares.begin(worker + 1);
  const int tile = static_cast<int>(quotient(static_cast<uint32_t>(first), shares.by_stages)) + round;
  const int begin = tile * shares.stages, end = begin + shares.stages;
  return {tile, round == 0 ? first - begin : 0, (after < end ? after : end) - begin, after <= end};
}

/// A part of the sum of a tile: accumulators meet in global memory. Whether this block came last, has the sums of all
/// parts now, and goes on.
template <typename C>
CORA_DEVICE bool add_up_parts(const Block<C>& block, const Piece& piece,
                              typename Block<C>::Acc (&acc)[C::kRows][C::kCols][4], int32_t (&x_sum)[C::kXSums],
                              typename Block<C>::Acc (&acc_t)[1][C::kRankCols][4]) {
  using Acc = typename Block<C>::Acc;
  const GemmArgs& p = block.p;
  const bool fused = C::kFuses && p.fused;
  const int first = p.shares.owner(piece.tile * p.shares.stages);
  const int last = p.shares.owner((piece.tile + 1) * p.shares.stages - 1);
  // A block has at most two parts of tiles: of the one it begins in, and, as its first owner, of the one it ends in.
  const auto partial = [&](int worker) {
    return static_cast<Acc*>(p.partial) + (2 * static_cast<int64_t>(worker) + (worker == first)) * C::kPartials +
           block.tid;
  };
  Acc* const mine = partial(static_cast<int>(blockIdx.x));
#pragma unroll
  for (int i = 0; i < C::kAcc; ++i) store(mine + i * C::kThreads, acc[i / (C::kCols * 4)][i / 4 % C::kCols][i % 4]);
#pragma unroll
  for (int j = 0; j < C::kSums; ++j) store(mine + (C::kAcc + j) * C::kThreads, static_cast<Acc>(x_sum[j]));
  if (fused)
#pragma unroll
    for (int i = 0; i < C::kAccT; ++i) store(mine + (C::kAcc + C::kSums + i) * C::kThreads, acc_t[0][i / 4][i % 4]);
  block_sync();
  unsigned* const ticket = reinterpret_cast<unsigned*>(block.shared);
  if (block.tid == 0) {
    // After the barrier, so that it orders every thread's writes before the ticket; and before the next one, so that
    // it orders the ticket before every thread's reads.
    device_fence();
    *ticket = atomic_add(p.tickets + piece.tile, 1u);
    device_fence();
  }
  block_sync();
  const bool is_last = *ticket == static_cast<unsigned>(last - first);
  if (!is_last) return false;
  block_sync();  // everyone has read the ticket
#pragma unroll
  for (int i = 0; i < C::kAcc; ++i) acc[i / (C::kCols * 4)][i / 4 % C::kCols][i % 4] = 0;
#pragma unroll
  for (int j = 0; j < C::kSums; ++j) x_sum[j] = 0;
#pragma unroll
  for (int i = 0; i < C::kAccT; ++i) acc_t[0][i / 4][i % 4] = 0;
#pragma unroll(C::kParts < 16 ? 16 / C::kParts : 1)  // several loads under way
  for (int worker = first; worker <= last; ++worker) {
    const Acc* const part = partial(worker);
#pragma unroll
    for (int i = 0; i < C::kAcc; ++i)
      acc[i / (C::kCols * 4)][i / 4 % C::kCols][i % 4] += load_other_blocks(part + i * C::kThreads);
#pragma unroll
    for (int j = 0; j < C::kSums; ++j)
      x_sum[j] += static_cast<int32_t>(load_other_blocks(part + (C::kAcc + j) * C::kThreads));
    if (fused)
#pragma unroll
      for (int i = 0; i < C::kAccT; ++i)
        acc_t[0][i / 4][i % 4] += load_other_blocks(part + (C::kAcc + C::kSums + i) * C::kThreads);
  }
  return true;
}

/// y += B t, of t as add_adapter leaves it in shared memory; then that is free.
template <typename C>
CORA_DEVICE void multiply_by_b(const Block<C>& block, float (&y)[C::kRows][C::kCols][4]) {
  using T = typename C::T;
  const GemmArgs& p = block.p;
  const int lane = block.lane, group = block.group, quad = block.quad, warp_m = block.warp_m;
  const int pitch = C::t_pitch(p.rank_tiles);
  char* const shared = block.shared;
#pragma unroll(C::kStream&& C::kCols <= 2 ? 4 : 1)
  for (int tile = 0; tile < p.rank_tiles; ++tile) {
    Codes<8> b[C::kRows];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      const int64_t panel = block.panel_of(i);
      const uint2 v = panel < p.panels ? load<uint2>(p.b + (panel * p.rank_tiles + tile) * 256 + lane * 8)
                                       : uint2{0x80808080u, 0x80808080u};
      b[i].word[0] = v.x;
      b[i].word[1] = v.y;
    }
    const char* const t_tile =
        shared + (warp_m * C::kCols * 8 + group) * pitch + (tile * 16 + quad * 4) * (C::kInt8 ? 4 : 2);
    if constexpr (C::kInt8) {
      // A lane's ranks 4t, 4t + 1 are one step of eight, 4t + 2, 4t + 3 the next.
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t w[C::kRows][4], t[C::kCols][2];
#pragma unroll
        for (int i = 0; i < C::kRows; ++i)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int code = static_cast<int>(b[i].word[r % 2] >> (8 * (step + 2 * (r / 2))) & 0xff) - 128;
            w[i][r] = float_to_bits(static_cast<float>(code));
          }
#pragma unroll
        for (int j = 0; j < C::kCols; ++j) {
          const uint2 v = load<uint2>(t_tile + j * 8 * pitch + step * 8);
          t[j][0] = v.x;
          t[j][1] = v.y;
        }
        mma_tf32(y, w, t);
      }
    } else {
      uint32_t w[C::kRows][4], t[C::kCols][2];
#pragma unroll
      for (int i = 0; i < C::kRows; ++i) adapter_operand<T>(b[i], 0, w[i]);
#pragma unroll
      for (int j = 0; j < C::kCols; ++j) {
        const uint2 v = load<uint2>(t_tile + j * 8 * pitch);
        t[j][0] = v.x;
        t[j][1] = v.y;
      }
      mma16<T>(y, w, t);
    }
  }
  block_sync();
}

/// y += B t: t to shared memory, from the fused sums or an earlier pass, then ceil(r / 16) more steps.
template <typename C>
CORA_DEVICE void add_adapter(const Block<C>& block, const typename Block<C>::Acc (&acc_t)[1][C::kRankCols][4],
                             float (&y)[C::kRows][C::kCols][4]) {
  using T = typename C::T;
  using Acc = typename Block<C>::Acc;
  const GemmArgs& p = block.p;
  char* const shared = block.shared;
  const int group = block.group, quad = block.quad, warp_n = block.warp_n, first_token = block.first_token;
  const bool fused = C::kFuses && p.fused;
  const int pitch = C::t_pitch(p.rank_tiles), ranks = p.rank_tiles * 16;
  Acc* const parts = reinterpret_cast<Acc*>(shared + C::kBlockM * pitch);  // [t_parts][token][16]
  if (fused) {
#pragma unroll
    for (int j = 0; j < C::kRankCols; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        parts[(warp_n * C::kBlockM + block.token_of(j, e % 2)) * 16 + group + 8 * (e / 2)] = acc_t[0][j][e];
    block_sync();
  }
  for (int i = block.tid; i < C::kBlockM * ranks / 2; i += C::kThreads) {
    const int token = i / (ranks / 2), first_rank = i % (ranks / 2) * 2, m = first_token + token;
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = first_rank + e;
      float t = 0.0f;
      if (fused) {
        Acc sum = 0;
        for (int s = r / 16; s < C::t_parts(p.rank_tiles); s += p.rank_tiles)
          sum += parts[(s * C::kBlockM + token) * 16 + r % 16];
        if constexpr (C::kInt8) sum -= p.x_zero[block.item_of(token)] * p.a_sums[r];
        t = static_cast<float>(sum);
      } else if (m < p.m) {
#pragma unroll 16  // several loads under way
        for (int s = 0; s < p.t_splits; ++s) t += p.t[(static_cast<int64_t>(s) * p.m + m) * ranks + r];
      }
      v[e] = t * p.adapter_scale[r];
      if constexpr (C::kInt8) v[e] *= p.x_scale[block.item_of(token)];
    }
    if constexpr (C::kInt8)
      store(shared + token * pitch + first_rank * 4, uint2{round_tf32(v[0]), round_tf32(v[1])});
    else
      store(shared + token * pitch + first_rank * 2, pack2<T>(v[0], v[1]));
  }
  block_sync();
  multiply_by_b<C>(block, y);
}

// --- Storing -------------------------------------------------------------------------------------------------------

/// The tile of y, float32 [token][channel] in shared memory, to its place; whole 16-byte pieces where y lets us.
template <typename C>
CORA_DEVICE void store_tile(const GemmArgs& p, const float* y, int first_panel, int first_token) {
  const Epilogue& e = p.epilogue;
  const int tid = reread_thread_index(), first_n = first_panel * kTileRows;
  const int tokens = p.m - first_token < C::kBlockM ? p.m - first_token : C::kBlockM;
  const int channels = p.n - first_n < C::kBlockN ? p.n - first_n : C::kBlockN;
  const auto offsets = [&](int token, const PixelStrides& s) { return place_in(s, pixel_of(p, first_token + token)); };
  const bool wide = e.add == nullptr && (e.out_type == kFloat16 || e.out_type == kBfloat16) &&
                    e.out_strides.channel == 1 && e.out_strides.pixel % 8 == 0 && e.out_strides.row % 8 == 0 &&
                    e.out_strides.item % 8 == 0 && reinterpret_cast<uintptr_t>(e.out) % 16 == 0 && p.n % 8 == 0;
  if (wide) {
#pragma unroll 1
    for (int i = tid; i < tokens * (C::kBlockN / 8); i += C::kThreads) {
      const int token = i / (C::kBlockN / 8), n = i % (C::kBlockN / 8) * 8;
      if (n >= channels) continue;
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 sum = load<float4>(y + token * C::kOutPitch + n + j);
        const float4 bias = load<float4>(p.bias + first_n + n + j);
        const float f[4] = {sum.x + bias.x, sum.y + bias.y, sum.z + bias.z, sum.w + bias.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[j + i] = f[i] < e.low ? e.low : f[i];
          v[j + i] = v[j + i] > e.high ? e.high : v[j + i];
        }
      }
      store(static_cast<uint16_t*>(e.out) + offsets(token, e.out_strides) + first_n + n, pack8(v, e.out_type));
    }
    return;
  }
  // Neighbouring threads take neighbouring elements of y: channels, or pixels if those are adjacent.
  const bool by_channel = e.out_strides.channel == 1;
#pragma unroll 1
  for (int i = tid; i < C::kBlockM * C::kBlockN; i += C::kThreads) {
    const int token = by_channel ? i / C::kBlockN : i % C::kBlockM, n = by_channel ? i % C::kBlockN : i / C::kBlockM;
    if (token >= tokens || n >= channels) continue;
    const int64_t add = e.add == nullptr ? 0 : offsets(token, e.add_strides) + (first_n + n) * e.add_strides.channel;
    finish_element(e, y[token * C::kOutPitch + n] + p.bias[first_n + n],
                   offsets(token, e.out_strides) + (first_n + n) * e.out_strides.channel, add);
  }
}

// --- The kernel ----------------------------------------------------------------------------------------------------

/// Whether it was the block's last piece.
template <typename C>
CORA_DEVICE bool compute(const GemmArgs& p, int round) {
  using Acc = typename Block<C>::Acc;
  const bool fused = C::kFuses && p.fused;
  const int fused_tiles = fused ? p.rank_tiles : 0;
  const int stage_bytes = C::kAdapterAt + C::kTilesK * fused_tiles * 1024;
  Piece piece = piece_of(p.shares, round);
  const int begin = piece.begin * C::kTilesK;
  const int end = piece.end == p.shares.stages ? p.walk.blocks() : piece.end * C::kTilesK;
  const bool segmented = C::kGrouped && p.grouped;

  Block<C> block(p, piece.tile, end);
  const auto panel_of = [&](int i) { return block.panel_of(i); };
  const auto token_of = [&](int j, int e) { return block.token_of(j, e); };

  if constexpr (!C::kStream) {
#pragma unroll 1
    for (int s = 0; s < C::kAhead; ++s) {
      if (begin + s * C::kTilesK < end) block.copy_stage(begin + s * C::kTilesK, block.shared + s * stage_bytes);
      async_commit();
    }
  }

  Acc acc[C::kRows][C::kCols][4] = {};
  Acc acc_t[1][C::kRankCols][4] = {};       // fused: this warp's rank tile over its share of K
  float total[C::kRows][C::kCols][4] = {};  // Int8: the scaled sums of the segments so far
  int32_t x_sum[C::kCols] = {};             // Int8: sum of x over the segment; this lane's part of token `group`
  RowParameters<C> rows[C::kRows];
  bool sum_x = C::kInt8 && segmented;
  if (!segmented) {
    int left_over = 0;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        left_over |= rows[i].set(h, block.qparams_of(0, block.warp_n * C::kRows + i, h), p.bits);
    if constexpr (C::kInt8) {
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) left_over |= shuffle_xor(left_over, mask);
      sum_x = left_over != 0;
    }
  }

  /// Int8: the integers of a segment, sum of (x - zero_x) (code - zero), times its scale, onto `total`.
  [[maybe_unused]] const auto end_segment = [&](int segment) {
    if constexpr (C::kInt8) {
      const int32_t count = p.walk.taps * p.walk.segment_channels;
      float scale[C::kRows][2];
      int32_t left_over[C::kRows][2], sums[C::kRows][2];
#pragma unroll
      for (int i = 0; i < C::kRows; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 q = block.qparams_of(segment, block.warp_n * C::kRows + i, h);
          RowParameters<C> row;
          scale[i][h] = q.x;
          left_over[i][h] = row.set(h, q, p.bits);
          const int64_t at = (static_cast<int64_t>(segment) * p.panels + panel_of(i)) * kTileRows + block.group + 8 * h;
          sums[i][h] = panel_of(i) < p.panels ? load<int32_t>(p.sums + at) : 0;
        }
#pragma unroll
      for (int j = 0; j < C::kCols; ++j) {
        int32_t part = x_sum[j];
        part += shuffle_xor(part, 1);
        part += shuffle_xor(part, 2);
        x_sum[j] = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int32_t zero_x = p.x_zero[block.item_of(token_of(j, e))];
          const int32_t sum = shuffle(part, 4 * (2 * block.quad + e)) - zero_x * count;  // of x - zero_x
#pragma unroll
          for (int i = 0; i < C::kRows; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int32_t near = acc[i][j][2 * h + e] - zero_x * sums[i][h];
              const float scaled =
                  scale[i][h] * (sum_x ? static_cast<float>(near + static_cast<int64_t>(left_over[i][h]) * sum)
                                       : static_cast<float>(near));
              total[i][j][2 * h + e] = C::kGrouped ? total[i][j][2 * h + e] + scaled : scaled;
              acc[i][j][2 * h + e] = 0;
            }
        }
      }
    }
  };

  // --- The loop over K ---
  if constexpr (C::kStream)
    multiply_by_stream<C>(block, rows[0], begin, end, segmented, acc);
  else
    multiply_by_warps<C>(block, rows, begin, end, stage_bytes, fused_tiles, segmented, sum_x, acc, acc_t, x_sum,
                         end_segment);
  async_wait<0>();
  block_sync();  // from here on the ring is free
  piece = piece_of(p.shares, round);
  block.find(piece.tile);
  if (p.early) wait_for_launch_before();

  if (p.t_out == nullptr && (piece.begin > 0 || piece.end < p.shares.stages) &&
      !add_up_parts<C>(block, piece, acc, x_sum, acc_t))
    return piece.last;

  if constexpr (C::kInt8) {
    if (!segmented) end_segment(0);
  }

  // --- x A^T of an earlier pass: its job ends here ---
  if (p.t_out != nullptr) {
    const int split = static_cast<int>(blockIdx.x) % p.shares.splits, ranks = p.panels * kTileRows;
    float* const t_out = p.t_out + static_cast<int64_t>(split) * p.m * ranks;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i)
#pragma unroll
      for (int j = 0; j < C::kCols; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = block.first_token + token_of(j, e % 2), r = panel_of(i) * kTileRows + block.group + 8 * (e / 2);
          if (m < p.m && panel_of(i) < p.panels)
            store(t_out + static_cast<int64_t>(m) * ranks + r,
                  C::kInt8 ? total[i][j][e] : static_cast<float>(acc[i][j][e]));
        }
    return true;
  }

  // --- Scale ---
  float y[C::kRows][C::kCols][4];
#pragma unroll
  for (int i = 0; i < C::kRows; ++i)
#pragma unroll
    for (int j = 0; j < C::kCols; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (C::kInt8)
          y[i][j][e] = total[i][j][e] * p.x_scale[block.item_of(token_of(j, e % 2))];
        else
          y[i][j][e] = segmented ? acc[i][j][e] : acc[i][j][e] * rows[i].scale[e / 2];
      }

  if (p.rank_tiles > 0) add_adapter<C>(block, acc_t, y);

  // --- Through shared memory, so that whole lines of y are written ---
  float* const out = reinterpret_cast<float*>(block.shared);
#pragma unroll
  for (int i = 0; i < C::kRows; ++i)
#pragma unroll
    for (int j = 0; j < C::kCols; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        out[token_of(j, e % 2) * C::kOutPitch + (block.warp_n * C::kRows + i) * kTileRows + block.group + 8 * (e / 2)] =
            y[i][j][e];
  block_sync();
  store_tile<C>(p, out, block.first_panel, block.first_token);
  return piece.last;
}

/// By warpgroup instructions: gemm_warpgroups.cuh.
template <typename C>
CORA_DEVICE bool compute_by_warpgroups(const GemmArgs& p, int round);

template <typename C>
CORA_GLOBAL(C::kThreads, C::kResident)
gemm_kernel(const GemmArgs p) {
  if (p.t_out != nullptr) {
    let_next_launch_begin();
    for (int i = static_cast<int>(blockIdx.x) * C::kThreads + reread_thread_index(); i < p.ticket_count;
         i += p.shares.workers * C::kThreads)
      p.tickets[i] = 0;
  }
  if (p.epilogue.border.codes != nullptr && p.t_out == nullptr)
    fill_border(p.epilogue.border, static_cast<int64_t>(reread_block_index()) * C::kThreads + reread_thread_index(),
                static_cast<int64_t>(p.shares.workers) * C::kThreads);
  bool last = false;
#pragma unroll 1
  for (int round = 0; !last; ++round) {
    if (round > 0) block_sync();  // shared memory is the next tile's
    if constexpr (C::kWarpgroup)
      last = compute_by_warpgroups<C>(p, round);
    else
      last = compute<C>(p, round);
  }
}

}  // namespace cora::cuda
