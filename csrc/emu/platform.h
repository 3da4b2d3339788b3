// cuda/platform.cuh for the CPU: the same names, on the emulator. See there for what each does.
#pragma once

#include "emu/emulator.h"

#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#define CORA_DEVICE inline
#define CORA_GLOBAL(threads, min_blocks) static void
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define threadIdx (::cora::emu::current->thread)
#define blockIdx (::cora::emu::current->block)
#define gridDim (::cora::emu::grid_dim)
#define blockDim (::cora::emu::block_dim)

// CUDA's vector types.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cora::cuda {

using Dim3 = emu::Dim3;

inline char* shared_memory() { return emu::shared_memory(); }
inline int reread_thread_index() { return static_cast<int>(threadIdx.x); }
inline int reread_block_index() { return static_cast<int>(blockIdx.x); }
inline void block_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::block_barrier(file, line);
}

namespace detail {

template <typename V>
struct Shuffle {
  V value;
  int source;
  V result;
  static void work(void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* self = static_cast<Shuffle*>(lanes[i]);
      self->result = static_cast<Shuffle*>(lanes[self->source])->value;
    }
  }
};

template <typename V>
V shuffle_from(V value, int source) {
  static const char identity = 0;
  Shuffle<V> s{value, source, value};
  emu::warp_collective(&identity, &s, Shuffle<V>::work);
  return s.result;
}

template <typename To, typename From>
To cast_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace detail

template <typename V>
V shuffle_xor(V value, int mask) {
  return detail::shuffle_from(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <typename V>
V shuffle(V value, int lane) {
  return detail::shuffle_from(value, lane);
}
inline bool warp_any(bool value) {
  int any = value;
  for (int mask = 1; mask < 32; mask *= 2) any |= shuffle_xor(any, mask);
  return any != 0;
}
inline void device_fence() {}
inline void let_next_launch_begin() {}  // launches run one after the other
inline void wait_for_launch_before() {}
inline unsigned atomic_add(unsigned* p, unsigned value) {
  emu::check_global(p, sizeof *p, "atomic");
  const unsigned before = *p;
  *p += value;
  emu::atomic_done();
  return before;
}

inline bool in_shared(const void* p) {
  const auto at = static_cast<const char*>(p) - emu::shared_memory();
  return at >= 0 && at < 256 * 1024;
}
template <typename V>
V load(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) emu::fail("misaligned load");
  if (!in_shared(p)) emu::check_global(p, sizeof(V), "load");
  return *static_cast<const V*>(p);
}
template <typename V>
void store(void* p, V value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) emu::fail("misaligned store");
  if (!in_shared(p)) emu::check_global(p, sizeof(V), "store");
  *static_cast<V*>(p) = value;
}
template <typename V>
V load_other_blocks(const V* p) {
  return load<V>(p);
}

inline void async_copy16(void* shared, const void* global, bool valid, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emu::async_copy(shared, global, valid, file, line);
}
inline void async_copy16(void* shared, const void* global, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emu::async_copy(shared, global, true, file, line);
}
// Addresses in shared memory: from its beginning on.
inline uint32_t shared_begin() { return 0; }
template <typename V>
V load(uint32_t at) {
  return load<V>(emu::shared_memory() + at);
}
inline void async_copy16(uint32_t shared, const void* global, bool valid, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emu::async_copy(emu::shared_memory() + shared, global, valid, file, line);
}
inline void async_copy16(uint32_t shared, const void* global, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emu::async_copy(emu::shared_memory() + shared, global, true, file, line);
}
inline void async_commit() { emu::async_commit(); }
template <int kLeft>
void async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::async_wait(kLeft, file, line);
}

namespace detail {

struct Matrices {
  uint32_t* result;
  const char* row;
};
inline void load_matrices(void* const* lanes) {
  for (int i = 0; i < 32; ++i)
    for (int m = 0; m < 4; ++m) {
      const char* row = static_cast<Matrices*>(lanes[8 * m + i / 4])->row;
      std::memcpy(&static_cast<Matrices*>(lanes[i])->result[m], row + 4 * (i % 4), 4);
    }
}

}  // namespace detail

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  static const char identity = 0;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emu::fail("ldmatrix: a row is not aligned to 16 bytes");
  detail::Matrices m{r, static_cast<const char*>(row)};
  emu::warp_collective(&identity, &m, detail::load_matrices);
}

// --- Arithmetic -------------------------------------------------------------------------------------------

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(both >> (8 * ((selector >> (4 * i)) & 7)) & 0xff) << (8 * i);
  return r;
}
inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline int32_t dot4_unsigned(uint32_t a, uint32_t b, int32_t c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int32_t>((a >> (8 * i) & 0xff) * (b >> (8 * i) & 0xff));
  return c;
}
inline float bits_to_float(uint32_t bits) { return detail::cast_bits<float>(bits); }
inline uint32_t float_to_bits(float value) { return detail::cast_bits<uint32_t>(value); }
inline float divide(float a, float b) { return a / b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

template <typename T>
float widen(uint16_t bits) {
  if constexpr (std::is_same_v<T, Half>) return static_cast<float>(detail::cast_bits<_Float16>(bits));
  return bits_to_float(static_cast<uint32_t>(bits) << 16);
}
template <typename T>
uint16_t narrow(float value) {
  if constexpr (std::is_same_v<T, Half>) return detail::cast_bits<uint16_t>(static_cast<_Float16>(value));
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <typename T>
uint32_t pack2(float low, float high) {
  return narrow<T>(low) | static_cast<uint32_t>(narrow<T>(high)) << 16;
}
template <typename T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r = 0;
  for (int h = 0; h < 32; h += 16) {
    // Products of 11-bit numbers are exact in double, and so is rounding twice: 53 >= 2 * 11 + 2.
    const double exact =
        static_cast<double>(widen<T>(static_cast<uint16_t>(a >> h))) * widen<T>(static_cast<uint16_t>(b >> h)) +
        widen<T>(static_cast<uint16_t>(c >> h));
    uint16_t bits;
    if constexpr (std::is_same_v<T, Half>)
      bits = detail::cast_bits<uint16_t>(static_cast<_Float16>(exact));
    else
      bits = narrow<T>(static_cast<float>(exact));
    r |= static_cast<uint32_t>(bits) << h;
  }
  return r;
}

// --- Tensor cores -----------------------------------------------------------------------------------------

namespace detail {

/// One rendezvous for a whole set of tiles: a fiber switch costs more than the arithmetic.
template <typename Acc>
struct Mma {
  Acc* acc;           // [rows][cols][4]
  const uint32_t* a;  // [rows][4]
  const uint32_t* b;  // [cols][2]
};

/// Element e of a register: `kPerRegister` to one, kReg(register, e) -> number.
template <typename Acc, int kRows, int kCols, int kPerRegister, typename ReadA, typename ReadB>
void mma_work(void* const* lanes, ReadA read_a, ReadB read_b) {
  constexpr int kDepth = 8 * kPerRegister;
  using Number = decltype(read_a(0u, 0));
  static Number a[16][kDepth], b[8][kDepth];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) {
      for (int lane = 0; lane < 32; ++lane) {
        const auto* m = static_cast<Mma<Acc>*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int e = 0; e < kPerRegister; ++e) {
          const int k = t * kPerRegister + e;
          if (j == 0)
            for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][k + r / 2 * 4 * kPerRegister] = read_a(m->a[i * 4 + r], e);
          for (int r = 0; r < 2; ++r) b[g][k + r * 4 * kPerRegister] = read_b(m->b[j * 2 + r], e);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        Acc* acc = static_cast<Mma<Acc>*>(lanes[lane])->acc + (i * kCols + j) * 4;
        const int g = lane / 4, t = lane % 4;
        for (int c = 0; c < 4; ++c) {
          const Number* x = a[g + 8 * (c / 2)];
          const Number* y = b[2 * t + c % 2];
          Number sum = 0;
          for (int k = 0; k < kDepth; ++k) sum += x[k] * y[k];
          acc[c] += sum;
        }
      }
    }
}

template <typename T, int kRows, int kCols>
void mma16_work(void* const* lanes) {
  static const float* const table = [] {
    auto* values = new float[65536];
    for (int i = 0; i < 65536; ++i) values[i] = widen<T>(static_cast<uint16_t>(i));
    return values;
  }();
  const auto read = [](uint32_t r, int e) { return table[r >> (16 * e) & 0xffff]; };
  mma_work<float, kRows, kCols, 2>(lanes, read, read);
}
template <int kRows, int kCols>
void mma8_work(void* const* lanes) {
  mma_work<int32_t, kRows, kCols, 4>(
      lanes, [](uint32_t r, int e) { return static_cast<int32_t>(static_cast<int8_t>(r >> (8 * e))); },
      [](uint32_t r, int e) { return static_cast<int32_t>(r >> (8 * e) & 0xff); });
}
template <int kRows, int kCols>
void mma_tf32_work(void* const* lanes) {
  const auto read = [](uint32_t r, int) { return bits_to_float(r & 0xffffe000u); };
  mma_work<float, kRows, kCols, 1>(lanes, read, read);
}

template <typename Acc, int kRows, int kCols>
void mma(Acc (&acc)[kRows][kCols][4], const uint32_t (&a)[kRows][4], const uint32_t (&b)[kCols][2],
         void (*work)(void* const*)) {
  Mma<Acc> m{&acc[0][0][0], &a[0][0], &b[0][0]};
  emu::warp_collective(reinterpret_cast<const void*>(work), &m, work);
}

}  // namespace detail

template <typename T, int kRows, int kCols>
void mma16(float (&acc)[kRows][kCols][4], const uint32_t (&a)[kRows][4], const uint32_t (&b)[kCols][2]) {
  detail::mma(acc, a, b, detail::mma16_work<T, kRows, kCols>);
}
template <int kRows, int kCols>
void mma8(int32_t (&acc)[kRows][kCols][4], const uint32_t (&a)[kRows][4], const uint32_t (&b)[kCols][2]) {
  detail::mma(acc, a, b, detail::mma8_work<kRows, kCols>);
}
template <int kRows, int kCols>
void mma_tf32(float (&acc)[kRows][kCols][4], const uint32_t (&a)[kRows][4], const uint32_t (&b)[kCols][2]) {
  detail::mma(acc, a, b, detail::mma_tf32_work<kRows, kCols>);
}
inline void warpgroup_publish() {}
inline void warpgroup_arrive() {}
inline void warpgroup_commit() { emu::warpgroup_commit(); }

namespace detail {

/// A lane's operands, by value: they outlive the call. What the pointers name is read when the instruction runs.
struct WarpgroupMma {
  int32_t* acc;
  const uint32_t* a;
  const char* x;
};
template <int kCols>
void warpgroup_mma8_work(void* const* lanes) {
  std::array<WarpgroupMma, 32> warp;
  for (size_t i = 0; i < 32; ++i) warp[i] = *static_cast<const WarpgroupMma*>(lanes[i]);
  emu::warpgroup_issue([warp] {
    int32_t a[16][32];
    for (size_t lane = 0; lane < 32; ++lane)
      for (size_t r = 0; r < 4; ++r)
        for (size_t e = 0; e < 4; ++e)
          a[lane / 4 + 8 * (r % 2)][lane % 4 * 4 + r / 2 * 16 + e] = static_cast<int8_t>(warp[lane].a[r] >> (8 * e));
    for (size_t column = 0; column < 8 * kCols; ++column) {
      uint8_t x[32];
      for (size_t k = 0; k < 32; ++k) {
        const auto linear = reinterpret_cast<uintptr_t>(warp[0].x) + column * 128 + k;
        x[k] = *reinterpret_cast<const uint8_t*>(linear ^ (linear >> 7 & 7) << 4);
      }
      for (size_t row = 0; row < 16; ++row) {
        int32_t sum = 0;
        for (size_t k = 0; k < 32; ++k) sum += a[row][k] * x[k];
        warp[row % 8 * 4 + column % 8 / 2].acc[column / 8 * 4 + row / 8 * 2 + column % 2] += sum;
      }
    }
  });
}

}  // namespace detail

template <int kCols>
void warpgroup_mma8(int32_t (&acc)[1][kCols][4], const uint32_t (&a)[4], const void* x) {
  if (reinterpret_cast<uintptr_t>(x) % 1024 % 32 != 0 || reinterpret_cast<uintptr_t>(x) % 1024 >= 128)
    emu::fail("warpgroup_mma8: columns of x do not begin at a multiple of 1024 bytes");
  static const char identity = 0;
  detail::WarpgroupMma m{&acc[0][0][0], a, static_cast<const char*>(x)};
  emu::warp_collective(&identity, &m, detail::warpgroup_mma8_work<kCols>);
}
template <int kLeft>
void warpgroup_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::warpgroup_wait(kLeft, file, line);
}
inline void warpgroup_settle(int32_t&) {}

/// To nearest, ties away from zero.
inline uint32_t round_tf32(float value) { return (float_to_bits(value) + 0x1000u) & 0xffffe000u; }

// --- Host side ------------------------------------------------------------------------------------------------

template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), Dim3 grid, int threads, size_t shared_bytes, void*, Args&&... args) {
  const bool ok = emu::launch(grid, {static_cast<unsigned>(threads)}, shared_bytes, [&] { kernel(args...); });
  return ok ? nullptr : emu::error();
}
template <typename... Params, typename... Args>
const char* launch_when(bool, void (*kernel)(Params...), Dim3 grid, int threads, size_t shared_bytes, void* stream,
                        Args&&... args) {
  return launch(kernel, grid, threads, shared_bytes, stream, std::forward<Args>(args)...);
}
inline const char* fill_zero(void* p, size_t bytes, void*) {
  std::memset(p, 0, bytes);
  return nullptr;
}

inline const char* copy_bytes(void* to, const void* from, size_t bytes, void*) {
  std::memcpy(to, from, bytes);
  return nullptr;
}

inline const char* has_code(void (*)()) { return nullptr; }

struct Device {
  int multiprocessors, major, minor;
};
inline const char* query(Device* device) {
  *device = {emu::multiprocessors, emu::device_major, 0};
  return nullptr;
}

}  // namespace cora::cuda
