// What:     q = clamp(rint(x / scale) + zero_point, 0, 2^bits - 1); out = scale * (q - zero_point);
//           residual = x - out. Backward: grad_x = grad inside the range, else 0; grad_scale = sum of
//           grad * (rint(x/s) - x/s inside, q - zero_point outside).
// Inputs:   x, grad f32, f16 or bf16 [rows, cols] contiguous; scale f32, zero_point i32 [q_rows, groups].
// Numerics: float32 inside, true division, half to even, no FMA: codes equal the CPU's. The scale gradient is summed
//           in float64 in a fixed order, twice: within a piece of a run by its warp, over pieces by another.
// Method:   forward: four elements a thread where a run (elements of one scale) is a multiple of four, the scale found
//           by one multiplication. Backward: a warp a piece, so that the gradient of the scale needs no other warp.
// Cost:     forward 4 B in, 4..9 B out an element of f32; backward 8 B in, 4 B out. Memory-bound.
#include "cuda/fake_quantize.cuh"

#include "cuda/elements.cuh"

namespace cora::cuda {

namespace {

constexpr int kThreads = 256;
// Elements of a run that one warp sums up: few enough for many warps, but a run has no more pieces than the warp that
// adds them up gets through quickly.
constexpr int64_t kPiece = 2048, kMostPieces = 8192;

struct Code {
  float q, rounded, ratio;
  bool inside;
};

CORA_DEVICE Code quantize(float x, float scale, float zero_point, float top) {
  Code c;
  c.ratio = divide(x, scale);
  c.rounded = rintf(c.ratio);
  const float v = c.rounded + zero_point;
  c.inside = v >= 0.0f && v <= top;
  c.q = v > 0.0f ? v : 0.0f;
  c.q = c.q < top ? c.q : top;
  return c;
}

/// x as runs of elements that share a scale: run i takes scale i % scales.
struct Runs {
  int64_t length, count, scales, piece, pieces;  // a run is `pieces` times `piece` elements, the last maybe fewer
};

Runs runs_of(const QuantizeShape& s) {
  const int64_t total = s.rows * s.cols;
  Runs r{};
  if (total == 0) return r;
  r.length = s.q_rows == 1 && s.groups == 1 ? total : s.cols / s.groups;
  r.count = total / r.length;
  r.scales = s.q_rows * s.groups;
  r.piece = round_up(r.length, kPiece * kMostPieces) / kMostPieces;
  r.pieces = (r.length + r.piece - 1) / r.piece;
  return r;
}

/// kVector elements at i, which is a multiple of it.
template <int kVector>
CORA_DEVICE void read(const void* p, int64_t i, int type, float (&v)[kVector]) {
  if constexpr (kVector == 4) {
    if (type == kFloat32) {
      const float4 f = load<float4>(static_cast<const float*>(p) + i);
      v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
    } else {
      const uint2 u = load<uint2>(static_cast<const uint16_t*>(p) + i);
      const uint32_t pair[2] = {u.x, u.y};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint16_t bits = static_cast<uint16_t>(pair[e / 2] >> (16 * (e % 2)));
        v[e] = type == kFloat16 ? widen<Half>(bits) : widen<Bfloat16>(bits);
      }
    }
  } else {
    v[0] = read_element(p, i, type);
  }
}

template <int kVector>
CORA_DEVICE void write(void* p, int64_t i, int type, const float (&v)[kVector]) {
  if constexpr (kVector == 4) {
    if (type == kFloat32) {
      store(static_cast<float*>(p) + i, float4{v[0], v[1], v[2], v[3]});
    } else {
      const bool half = type == kFloat16;
      store(static_cast<uint16_t*>(p) + i, uint2{half ? pack2<Half>(v[0], v[1]) : pack2<Bfloat16>(v[0], v[1]),
                                                 half ? pack2<Half>(v[2], v[3]) : pack2<Bfloat16>(v[2], v[3])});
    }
  } else {
    write_element(p, i, type, v[0]);
  }
}

/// Index of the scale of run `run`.
CORA_DEVICE int64_t scale_of(int64_t run, const Runs& r) { return r.scales == r.count ? run : run % r.scales; }

template <int kVector>
CORA_GLOBAL(kThreads, 1)
forward_kernel(const void* __restrict__ x, const int type, const float* __restrict__ scale,
               const int32_t* __restrict__ zero_point, const Runs r, const Divide by_length, const int64_t total,
               const float top, void* __restrict__ out, void* __restrict__ residual, uint8_t* __restrict__ codes) {
  for (int64_t i = thread_index() * kVector; i < total; i += thread_count() * kVector) {
    const int64_t q = scale_of(quotient(i, by_length), r);
    const float s = scale[q], zp = static_cast<float>(zero_point[q]);
    float v[kVector], y[kVector], rest[kVector];
    read(x, i, type, v);
    uint32_t packed = 0;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const Code c = quantize(v[e], s, zp, top);
      y[e] = s * (c.q - zp);
      rest[e] = v[e] - y[e];
      packed |= static_cast<uint32_t>(c.q) << (8 * e);
    }
    write(out, i, type, y);
    if (residual != nullptr) write(residual, i, type, rest);
    if (codes != nullptr) {
      if constexpr (kVector == 4)
        store(codes + i, packed);
      else
        codes[i] = static_cast<uint8_t>(packed);
    }
  }
}

template <int kVector>
CORA_GLOBAL(kThreads, 1)
backward_kernel(const void* __restrict__ grad, const void* __restrict__ x, const int type,
                const float* __restrict__ scale, const int32_t* __restrict__ zero_point, const Runs r, const float top,
                void* __restrict__ grad_x, double* __restrict__ partial) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t piece = thread_index() / 32; piece < r.count * r.pieces; piece += thread_count() / 32) {
    const int64_t run = piece / r.pieces, first = piece % r.pieces * r.piece, q = scale_of(run, r);
    const int64_t length = r.length - first < r.piece ? r.length - first : r.piece;
    const float s = scale[q], zp = static_cast<float>(zero_point[q]);
    double sum = 0;
    for (int64_t i = lane * kVector; i < length; i += 32 * kVector) {
      const int64_t at = run * r.length + first + i;
      float g[kVector], v[kVector];
      read(grad, at, type, g);
      read(x, at, type, v);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const Code c = quantize(v[e], s, zp, top);
        sum += g[e] * (c.inside ? c.rounded - c.ratio : c.q - zp);
        g[e] = c.inside ? g[e] : 0.0f;
      }
      write(grad_x, at, type, g);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) store(partial + piece, sum);
  }
}

/// grad_scale[q]: the pieces of every run that has scale q, by a warp.
CORA_GLOBAL(kThreads, 1)
scale_gradient_kernel(const double* __restrict__ partial, const Runs r, float* __restrict__ grad_scale) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t per_scale = r.count / r.scales * r.pieces;
  for (int64_t q = thread_index() / 32; q < r.scales; q += thread_count() / 32) {
    double sum = 0;
    if (r.count == r.scales) {
#pragma unroll 8  // several loads under way
      for (int64_t i = lane; i < per_scale; i += 32) sum += partial[q * r.pieces + i];
    } else {
      for (int64_t i = lane; i < per_scale; i += 32)
        sum += partial[(i / r.pieces * r.scales + q) * r.pieces + i % r.pieces];
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) grad_scale[q] = static_cast<float>(sum);
  }
}

bool aligned(const void* p, int bytes) { return p == nullptr || reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

const char* fake_quantize(const void* x, int type, const float* scale, const int32_t* zero_point, QuantizeShape shape,
                          int bits, void* out, void* residual, uint8_t* codes, void* stream) {
  const int64_t total = shape.rows * shape.cols;
  if (total == 0) return nullptr;
  const Runs r = runs_of(shape);
  const int bytes = 4 * element_bytes(type);
  const bool wide =
      r.length % 4 == 0 && aligned(x, bytes) && aligned(out, bytes) && aligned(residual, bytes) && aligned(codes, 4);
  return launch(wide ? forward_kernel<4> : forward_kernel<1>, Dim3{grid_for(wide ? total / 4 : total, kThreads), 1, 1},
                kThreads, 0, stream, x, type, scale, zero_point, r, divide_by(r.length, total), total,
                static_cast<float>(max_code(bits)), out, residual, codes);
}

int64_t quantize_parts(QuantizeShape shape) {
  const Runs r = runs_of(shape);
  return r.count * r.pieces;
}

const char* fake_quantize_backward(const void* grad, const void* x, int type, const float* scale,
                                   const int32_t* zero_point, QuantizeShape shape, int bits, void* grad_x,
                                   float* grad_scale, double* partial, void* stream) {
  if (shape.rows * shape.cols == 0)
    return fill_zero(grad_scale, static_cast<size_t>(shape.q_rows * shape.groups) * 4, stream);
  const Runs r = runs_of(shape);
  const int bytes = 4 * element_bytes(type);
  const bool wide = r.length % 4 == 0 && aligned(x, bytes) && aligned(grad, bytes) && aligned(grad_x, bytes);
  if (const char* error = launch(wide ? backward_kernel<4> : backward_kernel<1>,
                                 Dim3{grid_for(r.count * r.pieces * 32, kThreads), 1, 1}, kThreads, 0, stream, grad, x,
                                 type, scale, zero_point, r, static_cast<float>(max_code(bits)), grad_x, partial))
    return error;
  return launch(scale_gradient_kernel, Dim3{grid_for(r.scales * 32, kThreads), 1, 1}, kThreads, 0, stream,
                static_cast<const double*>(partial), r, grad_scale);
}

}  // namespace cora::cuda
