// What:     x as the GEMM reads it. Float x that is not channels-last, 16-byte aligned or a multiple of 8 channels is
//           copied so. x to be quantized becomes 8-bit codes, channels-last, a multiple of 16 channels, inside a border
//           of zero-points: padding then costs the GEMM nothing. Dynamic ranges are taken per item.
// Numerics: scale = (max(x, 0) - min(x, 0)) / top, or 1 if that is 0; zero = clamp(rint(-min / scale), 0, top);
//           code = clamp(rint(x / scale) + zero, 0, top): as on the CPU, bit for bit. NaN takes code 0.
// Method:   one 16-byte piece of the result a thread; neighbouring threads take neighbouring pixels when x is
//           channels-first, neighbouring channels when it is channels-last.
// Cost:     x once (twice with a dynamic range), the copy once. Memory-bound.
#include "cuda/stage.cuh"

#include "cuda/elements.cuh"

namespace cora::cuda {

namespace {

constexpr int kThreads = 256;

/// How the elements of an image are found by their number: [pixel][channel], or [channel][pixel] where its channels are
/// not neighbours.
struct Order {
  bool by_channel;
  int64_t image;              // elements of an item
  Divide item, minor, width;  // by elements of an item; by those of a pixel, or of a channel; by pixels of a row
};
struct Place {
  int64_t item, row, column, channel;
};
Order order_of(bool by_channel, int64_t items, int64_t height, int64_t width, int64_t channels) {
  const int64_t image = height * width * channels, total = items * image;
  return {by_channel, image, divide_by(image, total), divide_by(by_channel ? channels : height * width, total),
          divide_by(width, total)};
}
CORA_DEVICE Place place_of(int64_t i, const Order& o) {
  const int64_t item = quotient(i, o.item), rest = i - item * o.image;
  const int64_t major = quotient(rest, o.minor), minor = rest - major * o.minor.divisor;
  const int64_t pixel = o.by_channel ? major : minor, row = quotient(pixel, o.width);
  return {item, row, pixel - row * o.width.divisor, o.by_channel ? minor : major};
}
CORA_DEVICE int64_t offset_of(const Place& p, const PixelStrides& s) {
  return p.item * s.item + p.row * s.row + p.column * s.pixel + p.channel * s.channel;
}

/// Smallest and largest element of a slice of an item: grid (slices, items).
CORA_GLOBAL(kThreads, 1) range_kernel(const Input x, const Order order, float2* __restrict__ ranges) {
  const int64_t count = order.image;
  const int64_t first = count * blockIdx.x / gridDim.x, last = count * (blockIdx.x + 1) / gridDim.x;
  float low = 0.0f, high = 0.0f;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const int64_t at = blockIdx.y * x.strides.item + offset_of(place_of(i, order), x.strides);
    const float v = read_element(x.data, at, x.type);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  float2* const shared = reinterpret_cast<float2*>(shared_memory());
  shared[threadIdx.x] = float2{low, high};
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    block_sync();
    if (threadIdx.x < half) {
      const float2 other = shared[threadIdx.x + half];
      float2& mine = shared[threadIdx.x];
      mine.x = other.x < mine.x ? other.x : mine.x;
      mine.y = other.y > mine.y ? other.y : mine.y;
    }
  }
  if (threadIdx.x == 0) ranges[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = shared[0];
}

/// Scale and zero-point of every item, from its slices' ranges or from the caller.
CORA_GLOBAL(kThreads, 1)
parameters_kernel(const Input x, const int count, const int slices, const float2* __restrict__ ranges,
                  float* __restrict__ scale, int32_t* __restrict__ zero) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= count) return;
  if (x.parameters == kOnHost) {
    scale[i] = x.host_scale;
    zero[i] = x.host_zero_point;
  } else if (x.parameters == kOnDevice) {
    scale[i] = x.scale[0];
    zero[i] = x.zero_point[0];
  } else {
    float low = 0.0f, high = 0.0f;
    for (int s = 0; s < slices; ++s) {
      const float2 r = ranges[static_cast<int64_t>(i) * slices + s];
      low = r.x < low ? r.x : low;
      high = r.y > high ? r.y : high;
    }
    const float top = static_cast<float>(max_code(x.x_bits));
    const float range_scale = divide(high - low, top);
    const float s = range_scale > 0.0f ? range_scale : 1.0f;
    float z = rintf(divide(-low, s));
    z = z > 0.0f ? z : 0.0f;
    scale[i] = s;
    zero[i] = static_cast<int32_t>(z < top ? z : top);
  }
}

/// x as float32 [items][channels][height][width]; through its codes where it has a quantizer.
CORA_GLOBAL(kThreads, 1)
values_kernel(const Input x, const Order order, const float* __restrict__ scale, const int32_t* __restrict__ zero,
              float* __restrict__ out) {
  const int64_t halo = x.type == kUint8 ? x.halo * (x.strides.row + x.strides.pixel) : 0;
  for (int64_t i = thread_index(); i < order.image * x.items; i += thread_count()) {
    const Place place = place_of(i, order);
    const int64_t at = offset_of(place, x.strides) + halo;
    const int64_t q = x.parameters == kDynamic ? place.item : 0;
    float v;
    if (x.type == kUint8) {
      v = scale[q] * static_cast<float>(static_cast<const uint8_t*>(x.data)[at] - zero[q]);
    } else {
      v = read_element(x.data, at, x.type);
      if (x.x_bits > 0) {
        const float z = static_cast<float>(zero[q]), top = static_cast<float>(max_code(x.x_bits));
        float code = rintf(divide(v, scale[q])) + z;
        code = code > 0.0f ? code : 0.0f;
        v = scale[q] * ((code < top ? code : top) - z);
      }
    }
    out[i] = v;
  }
}

// y may be where the result goes: an element is read before it is written, by the same thread.
CORA_GLOBAL(kThreads, 1)
finish_kernel(const void* y, const int type, const PixelStrides s, const int64_t total, const Order order,
              const float* __restrict__ bias, const Epilogue e) {
  for (int64_t i = thread_index(); i < total; i += thread_count()) {
    const Place place = place_of(i, order);
    const float value = read_element(y, offset_of(place, s), type) + (bias == nullptr ? 0.0f : bias[place.channel]);
    finish_element(e, value, offset_of(place, e.out_strides), e.add == nullptr ? 0 : offset_of(place, e.add_strides));
  }
}

/// 16 bytes of 16-bit numbers, or 32 of float32, as eight floats and back.
CORA_DEVICE void read8(const void* p, int64_t i, int type, float (&v)[8]) {
  if (type == kFloat32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 f = load<float4>(static_cast<const float*>(p) + i + 4 * half);
      v[4 * half] = f.x, v[4 * half + 1] = f.y, v[4 * half + 2] = f.z, v[4 * half + 3] = f.w;
    }
  } else {
    const uint4 u = load<uint4>(static_cast<const uint16_t*>(p) + i);
    const uint32_t pair[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const uint16_t bits = static_cast<uint16_t>(pair[c / 2] >> (16 * (c % 2)));
      v[c] = type == kFloat16 ? widen<Half>(bits) : widen<Bfloat16>(bits);
    }
  }
}
CORA_DEVICE void write8(void* p, int64_t i, int type, const float (&v)[8]) {
  if (type == kFloat32) {
    store(static_cast<float*>(p) + i, float4{v[0], v[1], v[2], v[3]});
    store(static_cast<float*>(p) + i + 4, float4{v[4], v[5], v[6], v[7]});
  } else {
    store(static_cast<uint16_t*>(p) + i, pack8(v, type));
  }
}

/// The same where y, add and the result are floats that lie alike, channels last and dense: eight a thread.
CORA_GLOBAL(kThreads, 1)
finish_dense_kernel(const void* y, const int type, const int64_t total, const Divide channels,
                    const float* __restrict__ bias, const Epilogue e) {
  for (int64_t i = thread_index() * 8; i < total; i += thread_count() * 8) {
    float v[8], more[8];
    read8(y, i, type, v);
    if (bias != nullptr) {
      read8(bias, i - quotient(i, channels) * channels.divisor, kFloat32, more);
#pragma unroll
      for (int c = 0; c < 8; ++c) v[c] += more[c];
    }
    if (e.add != nullptr) {
      read8(e.add, i, e.add_type, more);
#pragma unroll
      for (int c = 0; c < 8; ++c) v[c] += more[c];
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      v[c] = v[c] < e.low ? e.low : v[c];
      v[c] = v[c] > e.high ? e.high : v[c];
    }
    write8(e.out, i, e.out_type, v);
  }
}

/// Whether `p` can be read and written by read8 and write8 with channels last and dense.
bool dense(const void* p, const PixelStrides& s, int height, int width, int channels) {
  return s.channel == 1 && s.pixel == channels && s.row == static_cast<int64_t>(width) * channels &&
         s.item == static_cast<int64_t>(height) * width * channels && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

CORA_GLOBAL(kThreads, 1) border_kernel(const Border border) { fill_border(border, thread_index(), thread_count()); }

struct Target {
  int32_t channels, real_channels;  // of a pixel: all (a multiple of kPiece), those x has
  int32_t top, left;                // border
  int32_t height, width;            // with it
};

/// kCodes: 16 codes a piece; else 8 numbers of x's type.
template <bool kCodes>
CORA_GLOBAL(kThreads, 1)
stage_kernel(const Input x, const Target t, const Order pieces, const float* __restrict__ scale,
             const int32_t* __restrict__ zero, const int x_parameters, char* __restrict__ out) {
  constexpr int kPiece = kCodes ? 16 : 8;
  for (int64_t i = thread_index(); i < pieces.image * x.items; i += thread_count()) {
    const Place place = place_of(i, pieces);
    const int64_t item = place.item, pixel = (item * t.height + place.row) * t.width + place.column;
    const int c0 = static_cast<int>(place.channel) * kPiece;
    const int64_t row = place.row - t.top, column = place.column - t.left;
    const bool inside = row >= 0 && row < x.height && column >= 0 && column < x.width;
    const int64_t halo = x.type == kUint8 ? x.halo : 0;
    const int64_t from = item * x.strides.item + (row + halo) * x.strides.row + (column + halo) * x.strides.pixel +
                         c0 * x.strides.channel;
    const int left = t.real_channels - c0;
    if constexpr (kCodes) {
      const int q = x_parameters == 1 ? 0 : static_cast<int>(item);
      const float s = scale[q], z = static_cast<float>(zero[q]), top = static_cast<float>(max_code(x.x_bits));
      uint32_t word[4] = {};
#pragma unroll
      for (int c = 0; c < kPiece; ++c) {
        uint32_t code = 0;
        if (c < left) {
          if (!inside) {
            code = static_cast<uint32_t>(zero[q]);
          } else if (x.type == kUint8) {
            code = static_cast<const uint8_t*>(x.data)[from + c * x.strides.channel];
          } else {
            const float v = rintf(divide(read_element(x.data, from + c * x.strides.channel, x.type), s)) + z;
            const float clamped = v > 0.0f ? v : 0.0f;
            code = static_cast<uint32_t>(clamped < top ? clamped : top);
          }
        }
        word[c / 4] |= code << (8 * (c % 4));
      }
      store(out + (pixel * t.channels + c0), uint4{word[0], word[1], word[2], word[3]});
    } else {
      float v[8];
#pragma unroll
      for (int c = 0; c < kPiece; ++c)
        v[c] = c < left && inside ? read_element(x.data, from + c * x.strides.channel, x.type) : 0.0f;
      store(out + (pixel * t.channels + c0) * 2, pack8(v, x.type));
    }
  }
}

}  // namespace

int range_slices(int64_t elements) {
  const int64_t slices = elements / 8192;
  return static_cast<int>(slices < 1 ? 1 : slices < 64 ? slices : 64);
}

const char* stage_parameters(const Input& x, int channels, const Plan& plan, uint8_t* workspace, void* stream) {
  const int count = x.parameters == kDynamic ? x.items : 1;
  const int slices = range_slices(static_cast<int64_t>(x.height) * x.width * channels);
  float2* const ranges = reinterpret_cast<float2*>(workspace + plan.ranges_at);
  if (x.parameters == kDynamic) {
    const Order order = order_of(x.strides.channel == 1, 1, x.height, x.width, channels);
    // Items beyond the limit of the grid's second dimension go in slabs.
    for (int32_t first = 0; first < x.items; first += 65535) {
      Input slab = x;
      slab.items = x.items - first < 65535 ? x.items - first : 65535;
      slab.data = static_cast<const char*>(x.data) + first * x.strides.item * element_bytes(x.type);
      const char* error =
          launch(range_kernel, Dim3{static_cast<unsigned>(slices), static_cast<unsigned>(slab.items), 1}, kThreads,
                 kThreads * sizeof(float2), stream, slab, order, ranges + static_cast<int64_t>(first) * slices);
      if (error != nullptr) return error;
    }
  }
  return launch(parameters_kernel, Dim3{static_cast<unsigned>((count + kThreads - 1) / kThreads), 1, 1}, kThreads, 0,
                stream, x, count, slices, static_cast<const float2*>(ranges),
                reinterpret_cast<float*>(workspace + plan.x_scale_at),
                reinterpret_cast<int32_t*>(workspace + plan.x_zero_at));
}

namespace {
/// Offsets of a quantizer's parameters in a workspace of their own.
Plan parameters_plan(const Input& x, int channels) {
  Plan p{};
  const int64_t count = x.parameters == kDynamic ? x.items : 1;
  const int64_t slices = range_slices(static_cast<int64_t>(x.height) * x.width * channels);
  p.x_scale_at = round_up(x.parameters == kDynamic ? count * slices * 8 : 0, 256);
  p.x_zero_at = p.x_scale_at + round_up(count * 4, 256);
  p.bytes = p.x_zero_at + round_up(count * 4, 256);
  return p;
}
}  // namespace

int64_t values_bytes(const Input& x, int channels) {
  return x.parameters == kNoParameters ? 0 : parameters_plan(x, channels).bytes;
}

const char* values(const Input& x, int channels, float* out, uint8_t* workspace, void* stream) {
  const int64_t total = static_cast<int64_t>(x.items) * x.height * x.width * channels;
  if (total == 0) return nullptr;
  const Plan p = parameters_plan(x, channels);
  if (x.parameters != kNoParameters)
    if (const char* error = stage_parameters(x, channels, p, workspace, stream)) return error;
  return launch(values_kernel, Dim3{grid_for(total, kThreads), 1, 1}, kThreads, 0, stream, x,
                order_of(false, x.items, x.height, x.width, channels),
                reinterpret_cast<const float*>(workspace + p.x_scale_at),
                reinterpret_cast<const int32_t*>(workspace + p.x_zero_at), out);
}

const char* finish(const void* y, int type, PixelStrides strides, int items, int height, int width, int channels,
                   const float* bias, const Epilogue& epilogue, void* stream) {
  const Border& b = epilogue.border;
  if (b.codes != nullptr) {
    const int64_t pixels = int64_t{b.items} * (b.height * b.width - (b.height - 2 * b.halo) * (b.width - 2 * b.halo));
    const Dim3 grid{grid_for(pixels * b.channels / 16, kThreads), 1, 1};
    if (const char* error = launch(border_kernel, grid, kThreads, 0, stream, b)) return error;
  }
  const int64_t total = static_cast<int64_t>(items) * height * width * channels;
  if (total == 0) return nullptr;
  const auto lies = [&](const void* p, int of, const PixelStrides& s) {
    return of != kUint8 && dense(p, s, height, width, channels);
  };
  if (channels % 8 == 0 && lies(y, type, strides) && lies(epilogue.out, epilogue.out_type, epilogue.out_strides) &&
      (epilogue.add == nullptr || lies(epilogue.add, epilogue.add_type, epilogue.add_strides)))
    return launch(finish_dense_kernel, Dim3{grid_for(total / 8, kThreads), 1, 1}, kThreads, 0, stream, y, type, total,
                  divide_by(channels, total), bias, epilogue);
  return launch(finish_kernel, Dim3{grid_for(total, kThreads), 1, 1}, kThreads, 0, stream, y, type, strides, total,
                order_of(epilogue.out_strides.channel == 1, items, height, width, channels), bias, epilogue);
}

const char* stage_input(const LayerShape& shape, const Input& x, const Plan& plan, uint8_t* workspace, void* stream) {
  const bool codes = plan.method == kTensorCores8;
  const int border_y = codes ? shape.padding[0] : 0, border_x = codes ? shape.padding[1] : 0;
  const Target t{plan.staged_channels,    shape.channels,        border_y, border_x,
                 x.height + 2 * border_y, x.width + 2 * border_x};
  const Order pieces = order_of(x.strides.channel == 1, x.items, t.height, t.width, t.channels / (codes ? 16 : 8));
  const float* scale = reinterpret_cast<const float*>(workspace + plan.x_scale_at);
  const int32_t* zero = reinterpret_cast<const int32_t*>(workspace + plan.x_zero_at);
  const Dim3 grid{grid_for(pieces.image * x.items, kThreads), 1, 1};
  return launch(codes ? stage_kernel<true> : stage_kernel<false>, grid, kThreads, 0, stream, x, t, pieces, scale, zero,
                x.parameters == kDynamic ? x.items : 1, reinterpret_cast<char*>(workspace + plan.x_at));
}

}  // namespace cora::cuda
