// Host side of a layer call: choice of kernel, tile and sharing, the workspace, the launches in order:
//   8-bit x:  range of x (dynamic), its scale and zero-point, its codes inside a border
//   16-bit x: a channels-last, aligned copy where x is not
//   then t = x A^T where it is not fused, which clears the tickets where tiles are shared, and the GEMM.
#include "cuda/layer.cuh"

#include "cuda/gemm_configs.cuh"
#include "cuda/stage.cuh"

#include <algorithm>
#include <cstdlib>

namespace cora::cuda {

namespace {

constexpr int64_t kInt32Max = 0x7fffffff;
constexpr int64_t kFewTokens = 192;  // of a matrix on 16-bit x; more go through the merged weight
constexpr int kMostShared90 = 227 * 1024;
constexpr int kThreads = 256;

/// No part of a tile has arrived yet.
CORA_GLOBAL(kThreads, 1) clear_tickets_kernel(unsigned* const tickets, const int count) {
  let_next_launch_begin();
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i < count) tickets[i] = 0;
}

int64_t reach(const LayerShape& s, int d) { return static_cast<int64_t>(s.dilation[d]) * (s.kernel[d] - 1) + 1; }

/// Whether the GEMM can read x where it is: pixels of whole 16-byte pieces, each on a 16-byte address.
bool readable(const LayerShape& s, const Input& x, int method) {
  const int64_t size = element_bytes(x.type), piece = 16 / size;
  if (method == kTensorCores8 && (x.type != kUint8 || x.halo < s.padding[0] || x.halo < s.padding[1])) return false;
  return x.strides.channel == 1 && s.channels % piece == 0 && x.strides.pixel % piece == 0 &&
         x.strides.row % piece == 0 && x.strides.item % piece == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

TileShape tile_shape(bool integer, int tile, int container) {
  return integer ? tile8_shape(tile) : tile16_shape(tile, container);
}
bool is_by_warpgroups(bool integer, int tile) { return integer && tile >= kWarpgroups64; }
/// The tile of a pass that computes t. By warpgroups: few rows, many tokens, whatever the tile of y is.
int t_tile_of(bool integer, int tile) { return is_by_warpgroups(integer, tile) ? kWarpgroupsNarrow : tile; }

int64_t tiles_of(const TileShape& tile, int64_t n, int64_t m) {
  return (n + tile.block_n - 1) / tile.block_n * ((m + tile.block_m - 1) / tile.block_m);
}

/// Fewer stages than this are not worth a block of threads.
int least_stages(const TileShape& tile) { return tile.stage_tiles >= 4 ? 1 : 4; }

/// How many ways to split K where each part has a place of its own: enough blocks for the card, and few parts: every
/// block of the next pass reads them all.
int split_count(const TileShape& tile, int64_t tiles, int stages, int places) {
  int64_t splits = places / tiles, most = tile.block_m <= 16 ? 16 : 8;
  if (splits > stages / least_stages(tile)) splits = stages / least_stages(tile);
  if (splits > most) splits = most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

struct Sharing {
  int64_t tiles;
  int stages, workers;
  double time;  // in stages
};

/// Blocks of threads for the tiles of y: one each, or, if that is sooner done, as many as the card holds at once. In
/// stages of a tile: rounds of whole tiles, or an even share, and what parts cost: a block writes two at most, and
/// reads those of one tile. A part is taken for two tiles of waiting (of K; at most a stage), and its bytes for a
/// quarter of a stage's, as they stay in the second-level cache.
Sharing share(const TileShape& tile, int64_t n, int64_t tokens, int64_t tiles_k, int multiprocessors) {
  const int64_t tiles = tiles_of(tile, n, tokens), places = int64_t{multiprocessors} * tile.resident;
  const auto stages = static_cast<int>((tiles_k + tile.stage_tiles - 1) / tile.stage_tiles);
  const int64_t all = tiles * stages, most = all / least_stages(tile), workers = most < places ? most : places;
  const double whole = static_cast<double>((tiles + places - 1) / places) * stages;
  if (all > kInt32Max || workers < 1 || workers == tiles) return {tiles, stages, static_cast<int>(tiles), whole};
  const double part =
      (tile.stage_tiles > 2 ? 2.0 / tile.stage_tiles : 1) + 4.0 * tile.partials / (4.0 * tile.stage_bytes);
  const double parts = 3 + static_cast<double>(workers) / static_cast<double>(tiles);
  const double shared = static_cast<double>(all) / static_cast<double>(workers) + part * parts;
  if (shared < whole) return {tiles, stages, static_cast<int>(workers), shared};
  return {tiles, stages, static_cast<int>(tiles), whole};
}

int tile16_for(int64_t tokens) {
  if (tokens <= 16) return tokens <= 8 ? kDecode8 : kDecode16;
  return tokens <= 32 ? kDecode32 : tokens <= kFewTokens ? kDecode64 : kLarge128;
}

/// Whether the library holds code of its own for the device, sm_90a: that alone has early launches and warpgroup
/// instructions.
bool has_own_code([[maybe_unused]] const Device& device) {
#if defined(CORA_WARPGROUPS)
  return device.major == 9;
#else
  return false;
#endif
}

/// Whether torch's convolution on the merged weight is sooner done than the fused kernel, for 16-bit x. Rates are those
/// of a multiprocessor of an H200: the tile of 128 x 128, cuDNN's kernels, and memory. torch's way takes a launch for
/// the weight and, for bias or clamp, another that reads and writes y.
bool merges_convolution(const LayerShape& s, int64_t tokens, int multiprocessors) {
  constexpr double kFusedOps = 0.9e12, kTorchOps = 3.2e12, kBytes = 30e9, kLaunches = 4e-6;
  const double inputs = static_cast<double>(walk_of(s).blocks()) * kTileInputs;
  const double weights = static_cast<double>(columns_of(s)) * s.n, pixels = static_cast<double>(tokens);
  const double fused = 2 * pixels * inputs * static_cast<double>(round_up(s.n, 128)) / kFusedOps;
  const double bytes = weights * (2 + container_bits(s.bits) / 8.0) + 4 * pixels * s.n;
  const double torch = 2 * pixels * weights / kTorchOps + bytes / kBytes;
  return torch / multiprocessors + kLaunches < fused / multiprocessors;
}

/// Whether to use warpgroup instructions: where there are any, unless CORA_WARPGROUPS=0 is in the environment. The
/// number of a tile there (2 ..) wants that one, for timing.
bool warpgroups(const Device& device, int* wanted_tile) {
  const char* const wanted = std::getenv("CORA_WARPGROUPS");
  *wanted_tile = wanted != nullptr ? std::atoi(wanted) : 1;
  return has_own_code(device) && *wanted_tile != 0;
}

/// Cycles of a stage of an 8-bit tile, of what comes before and after the stages, and of a stage where the block has a
/// multiprocessor to itself: so that the order of the tiles is that of their times on an H200, of which this is the
/// half.
struct Cycles {
  double stage, tile, alone;
};
Cycles cycles_of(int tile) {
  switch (tile) {
    case kSmall8: return {2300, 4000, 2300};
    case kWarpgroups64: return {1000, 5000, 650};  // two blocks take turns
    case kWarpgroups128: return {750, 7000, 750};
    case kWarpgroups192: return {1000, 9000, 1000};
    default: return {900, 9000, 900};
  }
}

/// The tile by warpgroup instructions that is done first, or Small8.
int best_warpgroups(const LayerShape& s, int64_t tokens, int64_t tiles_k, int multiprocessors, int rank_tiles) {
  int best = kSmall8;
  double least = 0;
  for (int tile : {kSmall8, kWarpgroups64, kWarpgroups128, kWarpgroups192, kWarpgroupsNarrow}) {
    const TileShape shape = tile8_shape(tile);
    if (shape.block_m * (rank_tiles * 64 + 16) > kMostShared90) continue;  // t would not fit
    const Sharing sharing = share(shape, s.n, tokens, tiles_k, multiprocessors);
    const int64_t places = int64_t{multiprocessors} * shape.resident;
    const Cycles cycles = cycles_of(tile);
    const double time = sharing.time * (sharing.workers <= multiprocessors ? cycles.alone : cycles.stage) +
                        static_cast<double>((sharing.tiles + places - 1) / places) * cycles.tile;
    if (tile == kSmall8 || time < least) {
      least = time;
      best = tile;
    }
  }
  return best;
}

}  // namespace

const char* plan(const LayerShape& s, const Input& x, Plan* out) {
  Plan p{};
  p.out_height = static_cast<int32_t>((x.height + 2 * s.padding[0] - reach(s, 0)) / s.stride[0] + 1);
  p.out_width = static_cast<int32_t>((x.width + 2 * s.padding[1] - reach(s, 1)) / s.stride[1] + 1);
  const int64_t tokens = static_cast<int64_t>(x.items) * p.out_height * p.out_width;
  const bool integer = x.x_bits > 0 || x.type == kUint8;
  p.method = integer ? kTensorCores8 : kTensorCores16;
  if (!is_tiled(s) || (!integer && x.type == kFloat32) ||
      (integer && s.q_groups > 1 && s.channels / s.q_groups % 16 != 0) || tokens > kInt32Max / 2)
    p.method = kMerge;
  // Many rows of a matrix: writing the weight out once is cheap beside them, and torch's product is faster than ours.
  if (p.method == kTensorCores16 && tokens > kFewTokens && taps_of(s) == 1 && s.stride[0] == 1 && s.stride[1] == 1 &&
      s.padding[0] == 0 && s.padding[1] == 0 && x.height * x.width == 1)
    p.method = kMerge;
  *out = p;
  if (p.method == kMerge || tokens == 0 || s.n == 0) return nullptr;

  Device device;
  if (const char* error = query(&device)) return error;
  const bool image = x.height * x.width > 1;
  if (p.method == kTensorCores16 && image && merges_convolution(s, tokens, device.multiprocessors)) {
    out->method = kMerge;
    return nullptr;
  }
  p.tokens = static_cast<int32_t>(tokens);
  const Walk w = walk_of(s);
  const Parts parts = parts_of(s);
  const int container = container_bits(s.bits);
  const auto shape = [&](int tile) { return tile_shape(integer, tile, container); };
  const auto sharing_of = [&](int tile) { return share(shape(tile), s.n, tokens, w.blocks(), device.multiprocessors); };
  p.tile = integer ? kSmall8 : tile16_for(tokens);
  Sharing sharing = sharing_of(p.tile);
  // Scale groups of 8-bit x end inside the loop, each scaled where it ends: the small tile has room for that.
  if (integer && s.q_groups == 1 && tokens > 32) {
    // Copies of a stage find rows of x by 32 bits.
    const int64_t channels = round_up(s.channels, 16);
    const int64_t pixels =
        (x.height + 2 * std::max(x.halo, s.padding[0])) * int64_t{x.width + 2 * std::max(x.halo, s.padding[1])};
    const bool small_x = x.items * std::max(pixels * channels, x.type == kUint8 ? x.strides.item : 0) < int64_t{1}
                                                                                                            << 32;
    int wanted = 0;
    if (warpgroups(device, &wanted) && small_x) {
      p.tile = wanted >= kWarpgroups64 && wanted <= kWarpgroupsNarrow
                   ? wanted
                   : best_warpgroups(s, tokens, w.blocks(), device.multiprocessors, parts.rank_tiles);
      sharing = sharing_of(p.tile);
    } else if (s.rank <= 160) {
      const Sharing by_large = sharing_of(kLarge8);
      // Four times the products in a stage, and as many weights to dequantize: taken for 2.5 times the time.
      if (2.5 * by_large.time < sharing.time) {
        p.tile = kLarge8;
        sharing = by_large;
      }
    }
  }
  if (sharing.tiles > kInt32Max) return "the layer's output has too many tiles";
  p.stages = sharing.stages;
  p.tiles = static_cast<int32_t>(sharing.tiles);
  p.workers = integer && s.q_groups > 1 ? p.tiles : sharing.workers;
  const TileShape tile = shape(p.tile);
  // Fused: each block of channels computes t again (16 ranks: 1/8 more work), which is cheaper than another pass over
  // the windows of x; but decoding is bound by bytes.
  // As many tiles of A as the stages have room for in the 99 KiB of shared memory that every GPU has.
  const bool wide = container == 8;
  const int most_tiles = integer ? (wide && p.tile == kSmall8 ? 1 : 4) : (wide ? 4 : 2);
  p.fused = s.rank > 0 && parts.rank_tiles <= most_tiles && tile.fuses;
  // By warpgroups the work over again counts more, and the pass spreads over the card.
  const bool by_warpgroups = is_by_warpgroups(integer, p.tile);
  if (by_warpgroups) p.fused = p.fused && parts.rank_tiles <= 2 && s.n <= 4 * tile.block_n;
  p.t_splits = s.rank == 0 || p.fused ? 0 : 1;
  if (p.t_splits > 0 && (by_warpgroups || !integer)) {
    const TileShape t_tile = tile_shape(integer, t_tile_of(integer, p.tile), 8);
    p.t_splits =
        split_count(t_tile, tiles_of(t_tile, s.rank, tokens), p.stages, device.multiprocessors * t_tile.resident);
  }

  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at = round_up(at + bytes, 256);
    return begin;
  };
  p.staged = !readable(s, x, p.method);
  p.staged_channels = static_cast<int32_t>(round_up(s.channels, integer ? 16 : 8));
  if (p.staged) {
    const int64_t height = x.height + (integer ? 2 * s.padding[0] : 0),
                  width = x.width + (integer ? 2 * s.padding[1] : 0);
    p.x_at = take(x.items * height * width * p.staged_channels * (integer ? 1 : 2));
  }
  if (integer) {
    const int64_t count = x.parameters == kDynamic ? x.items : 1;
    p.ranges_at = take(
        x.parameters == kDynamic ? count * range_slices(static_cast<int64_t>(x.height) * x.width * s.channels) * 8 : 0);
    p.x_scale_at = take(count * 4);
    p.x_zero_at = take(count * 4);
  }
  if (p.t_splits > 0) p.t_at = take((by_warpgroups ? 1 : int64_t{p.t_splits}) * tokens * parts.rank_tiles * 16 * 4);
  if (p.workers != p.tiles) {
    p.partial_at = take(2 * int64_t{p.workers} * tile.partials * 4);
    p.tickets_at = take(sharing.tiles * 4);
  }
  p.early = has_own_code(device) && (p.t_splits > 0 || p.workers != p.tiles);
  p.bytes = at;
  *out = p;
  return nullptr;
}

const char* run(const LayerShape& s, const uint8_t* prepared, const Input& x, const Plan& plan,
                const Epilogue& epilogue, uint8_t* workspace, void* stream) {
  if (plan.tokens == 0 || s.n == 0) return nullptr;
  const Parts parts = parts_of(s);
  const bool integer = plan.method == kTensorCores8;
  if (integer)
    if (const char* error = stage_parameters(x, s.channels, plan, workspace, stream)) return error;
  if (plan.staged)
    if (const char* error = stage_input(s, x, plan, workspace, stream)) return error;

  GemmArgs g{};
  const int64_t size = integer ? 1 : 2;
  // 8-bit x lies inside its border: the windows begin there, and padding is no matter of the kernel's.
  g.height = x.height + (integer ? 2 * s.padding[0] : 0);
  g.width = x.width + (integer ? 2 * s.padding[1] : 0);
  if (plan.staged) {
    g.x = reinterpret_cast<const char*>(workspace + plan.x_at);
    g.x_pixel = plan.staged_channels * size;
    g.x_row = g.x_pixel * g.width;
    g.x_item = g.x_row * g.height;
  } else {
    g.x_item = x.strides.item * size;
    g.x_row = x.strides.row * size;
    g.x_pixel = x.strides.pixel * size;
    const int64_t skip = integer ? (x.halo - s.padding[0]) * g.x_row + (x.halo - s.padding[1]) * g.x_pixel : 0;
    g.x = static_cast<const char*>(x.data) + skip;
  }
  for (int d = 0; d < 2; ++d) {
    g.stride[d] = s.stride[d];
    g.padding[d] = integer ? 0 : s.padding[d];
    g.dilation[d] = s.dilation[d];
  }
  g.kernel_w = s.kernel[1];
  g.channels = s.channels;
  g.pixels = fast_divide(static_cast<int64_t>(plan.out_height) * plan.out_width);
  g.out_w = fast_divide(plan.out_width);
  g.walk = walk_of(s);
  g.contiguous = g.walk.taps == 1 && (g.walk.segments == 1 || g.walk.segment_channels % kTileInputs == 0);
  g.run = fast_divide(g.walk.run);
  g.taps_w = fast_divide(s.kernel[1]);
  g.segment_blocks = fast_divide(g.walk.blocks_per_segment);
  g.m = plan.tokens;
  g.x_scale = reinterpret_cast<const float*>(workspace + plan.x_scale_at);
  g.x_zero = reinterpret_cast<const int32_t*>(workspace + plan.x_zero_at);
  g.x_parameters = x.parameters == kDynamic ? x.items : 1;
  const auto floats = [&](int64_t offset) { return reinterpret_cast<const float*>(prepared + offset); };
  const auto integers = [&](int64_t offset) { return reinterpret_cast<const int32_t*>(prepared + offset); };
  const auto launch_gemm = [&](int container, int tile, GemmArgs& args) {
    const int block_n = tile_shape(integer, tile, container).block_n;
    args.n_blocks = fast_divide((args.n + block_n - 1) / block_n);
    return integer              ? gemm_int8(container, tile, args, stream)
           : x.type == kFloat16 ? gemm_half(container, tile, args, stream)
                                : gemm_bfloat16(container, tile, args, stream);
  };

  // The GEMM proper begins while the launch before it runs, which it waits for before it takes t or a ticket.
  const bool shared = plan.workers != plan.tiles;
  g.tickets = shared ? reinterpret_cast<unsigned*>(workspace + plan.tickets_at) : nullptr;
  if (plan.t_splits > 0) {
    GemmArgs t = g;
    t.ticket_count = shared ? plan.tiles : 0;
    t.n = s.rank;
    t.panels = parts.rank_tiles;
    t.w = prepared + parts.a_tiles;
    t.qparams = reinterpret_cast<const float2*>(prepared + parts.a_qparams);
    t.sums = integers(parts.a_sums);
    t.bits = 8;
    const int tile = t_tile_of(integer, plan.tile);
    t.shares = split_tiles(tiles_of(tile_shape(integer, tile, 8), s.rank, plan.tokens), plan.stages, plan.t_splits);
    t.t_out = reinterpret_cast<float*>(workspace + plan.t_at);
    if (is_by_warpgroups(integer, tile)) {  // the blocks that share K add to zeros
      const auto bytes = static_cast<size_t>(plan.tokens) * static_cast<size_t>(parts.rank_tiles) * 16 * 4;
      if (const char* error = fill_zero(t.t_out, bytes, stream)) return error;
    }
    if (const char* error = launch_gemm(8, tile, t)) return error;
  } else if (shared) {
    const Dim3 grid{static_cast<unsigned>((plan.tiles + kThreads - 1) / kThreads), 1, 1};
    if (const char* error = launch(clear_tickets_kernel, grid, kThreads, 0, stream, g.tickets, int{plan.tiles}))
      return error;
  }

  g.n = s.n;
  g.panels = parts.panels;
  g.w = prepared + parts.tiles;
  g.a = prepared + parts.a_tiles;
  g.b = prepared + parts.b_tiles;
  g.qparams = reinterpret_cast<const float2*>(prepared + parts.qparams);
  g.sums = integers(parts.sums);
  g.a_sums = integers(parts.a_sums);
  g.adapter_scale = floats(parts.adapter_scale);
  g.bias = floats(parts.bias);
  g.bits = s.bits;
  g.grouped = s.q_groups > 1;
  g.rank_tiles = parts.rank_tiles;
  g.fused = plan.fused;
  g.t = plan.t_splits > 0 ? reinterpret_cast<const float*>(workspace + plan.t_at) : nullptr;
  g.t_splits = plan.t_splits;
  g.shares = shared ? share_tiles(plan.tiles, plan.stages, plan.workers) : split_tiles(plan.tiles, plan.stages, 1);
  g.partial = shared ? workspace + plan.partial_at : nullptr;
  g.early = plan.early;
  g.epilogue = epilogue;
  return launch_gemm(container_bits(s.bits), plan.tile, g);
}

}  // namespace cora::cuda
