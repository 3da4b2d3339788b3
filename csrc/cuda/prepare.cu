// What:     A layer from the file's layout (bits.h) to the one the kernels read (layout.h), and back to a plain matrix
//           with the adapter merged in.
// Inputs:   codes uint8 [n, row_bytes], scale f32 and zero_point i32 [q_rows, q_groups], adapter, bias: all as in the
//           file. Layers that no fused kernel takes (is_tiled) are kept as they are, and merged for each call.
// Numerics: exact; the merged weight is scale * (code - zero) + sum over ranks in order, float32, rounded once to
//           `type`.
// Method:   a thread a lane of a tile (32 codes), or a thread an element: run once, or as the slower path.
#include "cuda/prepare.cuh"

#include "cuda/elements.cuh"

namespace cora::cuda {

namespace {

constexpr int kThreads = 256;

/// Column of the file's matrix at input `i` of tile block `block`, or -1 for padding.
CORA_DEVICE int64_t column_of(const Walk& w, int block, int i) {
  const int segment = block / w.blocks_per_segment;
  const int k = (block - segment * w.blocks_per_segment) * kTileInputs + i, tap = k / w.run, channel = k % w.run;
  if (tap >= w.taps || channel >= w.segment_channels) return -1;
  return static_cast<int64_t>(segment * w.segment_channels + channel) * w.taps + tap;
}

/// Puts the code (j, h, i) of a lane at its place among the lane's words, as layout.h says.
CORA_DEVICE void place(uint32_t (&word)[8], int container, int j, int h, int i, uint32_t code) {
  const int hi = i / 2, e = i % 2;
  if (container == 8) {
    word[4 * (j / 2) + 2 * (j % 2) + h] |= code << (8 * hi + 16 * e);
  } else if (container == 4) {
    word[j] |= code << (4 * (2 * hi + h) + 16 * e);
  } else {
    word[j / 2] |= (code & 3) << (2 * (4 * hi + 2 * (j % 2) + h) + 16 * e);
    if (container == 3) word[2] |= (code >> 2) << (8 * hi + 2 * j + h + 16 * e);
  }
}

CORA_DEVICE void write_words(uint8_t* tile, const uint32_t (&word)[8], int container, int lane) {
  if (container == 8 || container == 4) {
    store(tile + lane * 16, uint4{word[0], word[1], word[2], word[3]});
    if (container == 8) store(tile + 512 + lane * 16, uint4{word[4], word[5], word[6], word[7]});
  } else {
    store(tile + lane * 8, uint2{word[0], word[1]});
    if (container == 3) store(tile + 256 + lane * 4, word[2]);
  }
}

CORA_GLOBAL(kThreads, 1)
tile_kernel(const LayerShape s, const Walk w, const int panels, const uint8_t* __restrict__ codes,
            const int64_t row_stride, uint8_t* __restrict__ tiles) {
  const int container = container_bits(s.bits);
  const int64_t total = static_cast<int64_t>(w.blocks()) * panels * 32;
  for (int64_t i = thread_index(); i < total; i += thread_count()) {
    const int lane = static_cast<int>(i % 32), panel = static_cast<int>(i / 32 % panels);
    const int block = static_cast<int>(i / 32 / panels);
    uint32_t word[8] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int64_t column = column_of(w, block, 16 * j + 4 * (lane % 4) + q);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = panel * kTileRows + lane / 4 + 8 * h;
          if (column >= 0 && row < s.n)
            place(word, container, j, h, q, get_code(codes + row * row_stride, column, s.bits));
        }
      }
    write_words(tiles + i / 32 * tile_bytes(container), word, container, lane);
  }
}

/// (scale, zero-point) and the sum of code - nearest_zero, for each segment and row; a warp each.
CORA_GLOBAL(kThreads, 1)
qparams_kernel(const LayerShape s, const Walk w, const int panels, const uint8_t* __restrict__ codes,
               const int64_t row_stride, const float* __restrict__ scale, const int32_t* __restrict__ zero_point,
               float2* __restrict__ qparams, int32_t* __restrict__ sums) {
  const int lane = static_cast<int>(threadIdx.x % 32), rows = panels * kTileRows;
  for (int64_t i = thread_index() / 32; i < static_cast<int64_t>(w.segments) * rows; i += thread_count() / 32) {
    const int segment = static_cast<int>(i / rows), row = static_cast<int>(i % rows);
    float2 q{0.0f, 0.0f};
    int32_t sum = 0;
    if (row < s.n) {
      const int64_t at = static_cast<int64_t>(s.q_rows == 1 ? 0 : row) * s.q_groups + segment;
      q = float2{scale[at], static_cast<float>(zero_point[at])};
      const int near = nearest_zero(zero_point[at], s.bits);
      const int64_t first = static_cast<int64_t>(segment) * w.segment_channels * w.taps;
      for (int k = lane; k < w.segment_channels * w.taps; k += 32)
        sum += get_code(codes + row * row_stride, first + k, s.bits) - near;
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) {
      store(qparams + i, q);
      sums[i] = sum;
    }
  }
}

CORA_GLOBAL(kThreads, 1)
a_tile_kernel(const LayerShape s, const Walk w, const int rank_tiles, const int8_t* __restrict__ a, const int64_t k,
              uint8_t* __restrict__ tiles) {
  const int64_t total = static_cast<int64_t>(w.blocks()) * rank_tiles * 32;
  for (int64_t i = thread_index(); i < total; i += thread_count()) {
    const int lane = static_cast<int>(i % 32), tile = static_cast<int>(i / 32 % rank_tiles);
    const int block = static_cast<int>(i / 32 / rank_tiles);
    uint32_t word[8] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int64_t column = column_of(w, block, 16 * j + 4 * (lane % 4) + q);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = tile * 16 + lane / 4 + 8 * h;
          const int code = column >= 0 && row < s.rank ? a[row * k + column] : 0;
          place(word, 8, j, h, q, static_cast<uint32_t>(code + 128));
        }
      }
    write_words(tiles + i / 32 * tile_bytes(8), word, 8, lane);
  }
}

/// Sums of A's rows, and the (scale, zero-point) under which A is a weight of its own; a warp a row.
CORA_GLOBAL(kThreads, 1)
a_sums_kernel(const LayerShape s, const int ranks, const int8_t* __restrict__ a, const int64_t k,
              const float* __restrict__ scale, int32_t* __restrict__ sums, float* __restrict__ adapter_scale,
              float2* __restrict__ qparams) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t row = thread_index() / 32; row < ranks; row += thread_count() / 32) {
    int32_t sum = 0;
    if (row < s.rank)
      for (int64_t i = lane; i < k; i += 32) sum += a[row * k + i];
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) {
      sums[row] = sum;
      adapter_scale[row] = row < s.rank ? scale[row] : 0.0f;
      store(qparams + row, float2{1.0f, 128.0f});
    }
  }
}

/// Zeros between the parts: the same layer is the same bytes.
CORA_DEVICE void clear_gaps(const Gaps& gaps, uint8_t* prepared) {
  for (int gap = 0; gap < gaps.count; ++gap)
    for (int64_t i = gaps.begin[gap] + thread_index(); i < gaps.end[gap]; i += thread_count()) prepared[i] = 0;
}

CORA_GLOBAL(kThreads, 1)
b_tile_kernel(const LayerShape s, const int panels, const int rank_tiles, const int8_t* __restrict__ b,
              const float* __restrict__ bias, uint8_t* __restrict__ tiles, float* __restrict__ out_bias,
              const Gaps gaps, uint8_t* prepared) {
  const int64_t total = static_cast<int64_t>(panels) * rank_tiles * 32;
  for (int64_t i = thread_index(); i < total; i += thread_count()) {
    const int lane = static_cast<int>(i % 32), tile = static_cast<int>(i / 32 % rank_tiles);
    const int64_t panel = i / 32 / rank_tiles;
    uint32_t word[8] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int64_t row = panel * kTileRows + lane / 4 + 8 * h;
        const int r = tile * 16 + 4 * (lane % 4) + q;
        const int code = row < s.n && r < s.rank ? b[row * s.rank + r] : 0;
        place(word, 8, 0, h, q, static_cast<uint32_t>(code + 128));
      }
    store(tiles + i * 8, uint2{word[0], word[1]});
  }
  for (int64_t i = thread_index(); i < static_cast<int64_t>(panels) * kTileRows; i += thread_count())
    out_bias[i] = bias != nullptr && i < s.n ? bias[i] : 0.0f;
  clear_gaps(gaps, prepared);
}

// --- Back to a matrix -------------------------------------------------------------------------------------------

/// The code at (j, h, i) of a lane: the inverse of place and write_words.
CORA_DEVICE int code_in_tile(const uint8_t* tile, int container, int lane, int j, int h, int i) {
  const int hi = i / 2, e = i % 2;
  if (container == 8) return tile[512 * (j / 2) + lane * 16 + 4 * (2 * (j % 2) + h) + hi + 2 * e];
  if (container == 4) return load<uint32_t>(tile + lane * 16 + 4 * j) >> (4 * (2 * hi + h) + 16 * e) & 15;
  int code = load<uint32_t>(tile + lane * 8 + 4 * (j / 2)) >> (2 * (4 * hi + 2 * (j % 2) + h) + 16 * e) & 3;
  if (container == 3) code |= (load<uint32_t>(tile + 256 + lane * 4) >> (8 * hi + 2 * j + h + 16 * e) & 1) << 2;
  return code;
}

/// Element (row, column) of a tiled matrix: which tile, lane and code.
CORA_DEVICE int tiled_code(const Walk& w, const uint8_t* tiles, int panels, int container, int64_t row,
                           int64_t column) {
  const int channel = static_cast<int>(column / w.taps), tap = static_cast<int>(column % w.taps);
  const int segment = channel / w.segment_channels;
  const int k = tap * w.run + channel - segment * w.segment_channels;
  const int64_t block = static_cast<int64_t>(segment) * w.blocks_per_segment + k / kTileInputs;
  const int in_tile = k % kTileInputs, lane = static_cast<int>(row % 8) * 4 + in_tile % 16 / 4;
  return code_in_tile(tiles + (block * panels + row / kTileRows) * tile_bytes(container), container, lane, in_tile / 16,
                      static_cast<int>(row % 16) / 8, in_tile % 4);
}

CORA_DEVICE float adapter_element(const void* p, int64_t i, int type) {
  return type == kInt8 ? static_cast<float>(static_cast<const int8_t*>(p)[i]) : read_element(p, i, type);
}

CORA_GLOBAL(kThreads, 1)
merge_kernel(const LayerShape s, const Walk w, const Parts p, const bool tiled, const uint8_t* __restrict__ prepared,
             const int64_t k, const int64_t row_stride, void* __restrict__ out, void* __restrict__ bias,
             const int type) {
  if (bias != nullptr)
    for (int64_t i = thread_index(); i < s.n; i += thread_count())
      write_element(bias, i, type, reinterpret_cast<const float*>(prepared + p.bias)[i]);
  const float* const adapter_scale = reinterpret_cast<const float*>(prepared + p.adapter_scale);
  for (int64_t i = thread_index(); i < s.n * k; i += thread_count()) {
    const int64_t row = i / k, column = i % k;
    float value, adapter = 0.0f;
    if (tiled) {
      const int segment = static_cast<int>(column / w.taps / w.segment_channels);
      const float2 q = load<float2>(reinterpret_cast<const float2*>(prepared + p.qparams) +
                                    static_cast<int64_t>(segment) * p.panels * kTileRows + row);
      const int code = tiled_code(w, prepared + p.tiles, p.panels, container_bits(s.bits), row, column);
      value = q.x * (static_cast<float>(code) - q.y);
      for (int r = 0; r < s.rank; ++r) {
        const float a = static_cast<float>(tiled_code(w, prepared + p.a_tiles, p.rank_tiles, 8, r, column) - 128);
        const uint8_t* const b_tile = prepared + p.b_tiles + (row / kTileRows * p.rank_tiles + r / 16) * 256;
        const int lane = static_cast<int>(row % 8) * 4 + r % 16 / 4, byte = r % 4 / 2 + 2 * (r % 2);
        const int b = b_tile[lane * 8 + static_cast<int>(row % 16) / 8 * 4 + byte] - 128;
        adapter = fused_multiply_add(a * adapter_scale[r], static_cast<float>(b), adapter);
      }
    } else {
      const int64_t at = (s.q_rows == 1 ? 0 : row) * s.q_groups + column / (k / s.q_groups);
      const int code = get_code(prepared + p.tiles + row * row_stride, column, s.bits);
      const float zero = static_cast<float>(reinterpret_cast<const int32_t*>(prepared + p.sums)[at]);
      value = reinterpret_cast<const float*>(prepared + p.qparams)[at] * (static_cast<float>(code) - zero);
      const int64_t first = row / (s.n / s.groups) * s.rank;
      for (int r = 0; r < s.rank; ++r) {
        float a = adapter_element(prepared + p.a_tiles, (first + r) * k + column, s.adapter);
        if (s.adapter == kInt8) a *= adapter_scale[first + r];
        adapter = fused_multiply_add(a, adapter_element(prepared + p.b_tiles, row * s.rank + r, s.adapter), adapter);
      }
    }
    write_element(out, i, type, value + adapter);
  }
}

/// bias of a layer that is not tiled: zeros if there is none.
CORA_GLOBAL(kThreads, 1)
bias_kernel(const float* __restrict__ bias, const int64_t n, float* __restrict__ out, const Gaps gaps,
            uint8_t* prepared) {
  for (int64_t i = thread_index(); i < n; i += thread_count()) out[i] = bias == nullptr ? 0.0f : bias[i];
  clear_gaps(gaps, prepared);
}

}  // namespace

const char* prepare(const LayerShape& s, const LayerParameters& in, uint8_t* prepared, void* stream) {
  Gaps gaps{};
  const Parts p = parts_of(s, &gaps);
  const int64_t k = columns_of(s), bytes = row_bytes(k, s.bits);
  const char* error = nullptr;
  const auto then = [&](const char* result) {
    if (error == nullptr) error = result;
  };
  const auto at = [&](int64_t offset) { return prepared + offset; };
  if (s.n == 0) return p.bytes == 0 ? nullptr : fill_zero(prepared, static_cast<size_t>(p.bytes), stream);
  if (!is_tiled(s)) {
    const auto copy = [&](int64_t to, const void* from, int64_t count) {
      if (count > 0) then(copy_bytes(at(to), from, static_cast<size_t>(count), stream));
    };
    const int64_t q = static_cast<int64_t>(s.q_rows) * s.q_groups * 4, ranks = static_cast<int64_t>(s.groups) * s.rank;
    copy(p.tiles, in.codes, s.n * bytes);
    copy(p.qparams, in.scale, q);
    copy(p.sums, in.zero_point, q);
    copy(p.a_tiles, in.a, ranks * k * element_bytes(s.adapter));
    copy(p.b_tiles, in.b, static_cast<int64_t>(s.n) * s.rank * element_bytes(s.adapter));
    if (s.adapter == kInt8)
      copy(p.adapter_scale, in.adapter_scale, ranks * 4);
    else if (ranks > 0)
      then(fill_zero(at(p.adapter_scale), static_cast<size_t>(ranks * 4), stream));
    then(launch(bias_kernel, Dim3{grid_for(s.n, kThreads), 1, 1}, kThreads, 0, stream, in.bias, int64_t{s.n},
                reinterpret_cast<float*>(at(p.bias)), gaps, prepared));
    return error;
  }
  const Walk w = walk_of(s);
  const auto grid = [](int64_t threads) { return Dim3{grid_for(threads, kThreads), 1, 1}; };
  const int64_t rows = static_cast<int64_t>(p.panels) * kTileRows, ranks = static_cast<int64_t>(p.rank_tiles) * 16;
  then(launch(tile_kernel, grid(static_cast<int64_t>(w.blocks()) * p.panels * 32), kThreads, 0, stream, s, w, p.panels,
              in.codes, bytes, at(p.tiles)));
  then(launch(qparams_kernel, grid(w.segments * rows * 32), kThreads, 0, stream, s, w, p.panels, in.codes, bytes,
              in.scale, in.zero_point, reinterpret_cast<float2*>(at(p.qparams)),
              reinterpret_cast<int32_t*>(at(p.sums))));
  if (s.rank > 0) {
    const auto* a = static_cast<const int8_t*>(in.a);
    then(launch(a_tile_kernel, grid(static_cast<int64_t>(w.blocks()) * p.rank_tiles * 32), kThreads, 0, stream, s, w,
                p.rank_tiles, a, k, at(p.a_tiles)));
    then(launch(a_sums_kernel, grid(ranks * 32), kThreads, 0, stream, s, static_cast<int>(ranks), a, k,
                in.adapter_scale, reinterpret_cast<int32_t*>(at(p.a_sums)),
                reinterpret_cast<float*>(at(p.adapter_scale)), reinterpret_cast<float2*>(at(p.a_qparams))));
  }
  then(launch(b_tile_kernel, grid(rows * (p.rank_tiles > 0 ? p.rank_tiles : 1)), kThreads, 0, stream, s, p.panels,
              p.rank_tiles, static_cast<const int8_t*>(in.b), in.bias, at(p.b_tiles),
              reinterpret_cast<float*>(at(p.bias)), gaps, prepared));
  return error;
}

const char* merge(const LayerShape& s, const uint8_t* prepared, void* out, void* bias, int type, void* stream) {
  const int64_t k = columns_of(s);
  if (s.n == 0) return nullptr;
  if (merges_by_tiles(s, type)) return merge_by_tiles(s, prepared, out, bias, type, stream);
  const bool tiled = is_tiled(s);
  return launch(merge_kernel, Dim3{grid_for(s.n * k, kThreads), 1, 1}, kThreads, 0, stream, s,
                tiled ? walk_of(s) : Walk{1, 1, 1, 1, 1}, parts_of(s), tiled, prepared, k, row_bytes(k, s.bits), out,
                bias, type);
}

}  // namespace cora::cuda
