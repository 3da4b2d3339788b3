// Everything the kernels take from the machine: thread indices, barriers, asynchronous copies, shuffles, tensor-core
// instructions, 16-bit arithmetic, launches. The only file with inline PTX, and the only one that has a second
// version (emu/platform.h): kernels compile unchanged for a GPU and for the CPU emulator.
//
// 16-bit numbers travel as raw bits, two to a uint32_t (element 0 in the low half); Half and Bfloat16 are tags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cora::cuda {

struct Half {};      // IEEE binary16
struct Bfloat16 {};  // upper half of a float

}  // namespace cora::cuda

#if defined(CORA_EMULATED)

#include "emu/platform.h"

#else

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#define CORA_DEVICE __device__ __forceinline__
#define CORA_GLOBAL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)

namespace cora::cuda {

using Dim3 = dim3;

// --- Threads and barriers ------------------------------------------------------------------------------

CORA_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char cora_shared[];  // as warpgroup_mma8 wants its tiles
  return cora_shared;
}
/// threadIdx.x, read where it stands: what follows from it is not kept in registers around a loop.
CORA_DEVICE int reread_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
CORA_DEVICE int reread_block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
CORA_DEVICE void block_sync() { __syncthreads(); }
template <typename V>
CORA_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename V>
CORA_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
/// Whether any lane says so.
CORA_DEVICE bool warp_any(bool value) { return __any_sync(0xffffffffu, value) != 0; }
/// Makes this thread's writes visible to the whole device before its later ones.
CORA_DEVICE void device_fence() { __threadfence(); }

// Two launches in a row of which the second may begin before the first has ended (sm_90). In the first: from here on,
// once every block has come so far. In the second: until the first has ended and what it wrote is there.
CORA_DEVICE void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
CORA_DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
CORA_DEVICE unsigned atomic_add(unsigned* p, unsigned value) { return atomicAdd(p, value); }

// --- Memory -----------------------------------------------------------------------------------------------

template <typename V>
CORA_DEVICE V load(const void* p) {
  return *static_cast<const V*>(p);
}
template <typename V>
CORA_DEVICE void store(void* p, V value) {
  *static_cast<V*>(p) = value;
}
/// Past the first-level cache, which does not see what other blocks wrote.
template <typename V>
CORA_DEVICE V load_other_blocks(const V* p) {
  return __ldcg(p);
}

CORA_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
/// Where the block's shared memory begins, as a number that stays in a register: the compiler finds the address anew at
/// each use of shared_memory(), by three instructions.
CORA_DEVICE uint32_t shared_begin() {
  uint32_t at = shared_address(shared_memory());
  asm volatile("" : "+r"(at));
  return at;
}
/// From shared memory at such an address.
template <typename V>
CORA_DEVICE V load(uint32_t at) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  V v;
  if constexpr (sizeof(V) == 16) {
    uint32_t r[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
    __builtin_memcpy(&v, r, sizeof v);
  } else if constexpr (sizeof(V) == 8) {
    uint32_t r[2];
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at));
    __builtin_memcpy(&v, r, sizeof v);
  } else {
    uint32_t r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(at));
    __builtin_memcpy(&v, &r, sizeof v);
  }
  return v;
}

/// 16 bytes to shared memory, or zeros where `valid` is false; there after commit, wait and a barrier.
CORA_DEVICE void async_copy16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
CORA_DEVICE void async_copy16(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
CORA_DEVICE void async_copy16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
/// Without a hint that the bytes are read only once: ptxas 13.0 gives cp.async with a cache policy garbage registers.
CORA_DEVICE void async_copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
CORA_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until at most kLeft of this thread's groups are under way.
template <int kLeft>
CORA_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements; lane i names the 16-byte row i % 8 of matrix i / 8 and receives
/// elements 2 (i % 4) and + 1 of row i / 4 of each.
CORA_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- Integer and 16-bit arithmetic ------------------------------------------------------------------------

CORA_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
/// (a & b) | c in one instruction: of constants b and c the compiler makes two.
CORA_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
/// c + the dot product of four bytes with four bytes, both unsigned.
CORA_DEVICE int32_t dot4_unsigned(uint32_t a, uint32_t b, int32_t c) {
  return static_cast<int32_t>(__dp4a(a, b, static_cast<unsigned>(c)));
}
CORA_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
CORA_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }
CORA_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
CORA_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
CORA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

template <typename T>
CORA_DEVICE uint32_t pack2(float low, float high);
template <>
CORA_DEVICE uint32_t pack2<Half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
CORA_DEVICE uint32_t pack2<Bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

template <typename T>
CORA_DEVICE float widen(uint16_t bits);
template <>
CORA_DEVICE float widen<Half>(uint16_t bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
template <>
CORA_DEVICE float widen<Bfloat16>(uint16_t bits) {
  return bits_to_float(static_cast<uint32_t>(bits) << 16);
}

/// a * b + c on both halves, rounded once.
template <typename T>
CORA_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
CORA_DEVICE uint32_t fma2<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
template <>
CORA_DEVICE uint32_t fma2<Bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// --- Tensor cores -----------------------------------------------------------------------------------------

// One instruction multiplies a (rows: weights, 16 x K) with b (columns: x, K x 8) into acc (16 x 8). Lane l = 4g + t:
//   acc[0..3]: rows g, g, g + 8, g + 8, columns 2t, 2t + 1, 2t, 2t + 1.
//   K = 16, 16-bit: a[0..3]: rows g, g + 8, g, g + 8 at k = 2t.., 2t.., 2t + 8.., 2t + 8..; b[0..1]: column g, same k.
//   K = 32, 8-bit:  the same with four elements a register: k = 4t.., 4t.., 4t + 16.., 4t + 16...
//   K = 8,  tf32:   the same with one: k = t, t, t + 4, t + 4.

template <typename T>
CORA_DEVICE void mma_one(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Every row tile with every column tile.
template <typename T, int kRows, int kCols>
CORA_DEVICE void mma16(float (&acc)[kRows][kCols][4], const uint32_t (&a)[kRows][4], const uint32_t (&b)[kCols][2]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j) mma_one<T>(acc[i][j], a[i], b[j]);
}

/// a signed, b unsigned bytes; exact.
template <int kRows, int kCols>
CORA_DEVICE void mma8(int32_t (&acc)[kRows][kCols][4], const uint32_t (&a)[kRows][4], const uint32_t (&b)[kCols][2]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      int32_t (&d)[4] = acc[i][j];
      asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
          : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
}

/// Operands are floats of which the upper 19 bits count (round first: round_tf32).
template <int kRows, int kCols>
CORA_DEVICE void mma_tf32(float (&acc)[kRows][kCols][4], const uint32_t (&a)[kRows][4], const uint32_t (&b)[kCols][2]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      float (&d)[4] = acc[i][j];
      asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
}
CORA_DEVICE uint32_t round_tf32(float value) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(value));
  return r;
}

// --- Tensor cores by warpgroups: sm_90a only ------------------------------------------------------------------

// A warpgroup is warps 4i .. 4i + 3 of a block. Its instructions run on while its threads go on: operands in registers
// are the hardware's until the wait.

/// What this thread has in shared memory (stores, cp.async it waited for), visible to the warpgroup instructions that
/// come after the next barrier.
CORA_DEVICE void warpgroup_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Before the first instruction of a group: registers that were written since are the operands.
CORA_DEVICE void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// The instructions since the last commit are one group of work.
CORA_DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// acc += a x: 64 rows (16 a warp, laid out as in mma8) x 32 bytes of K, with 8 kCols columns. a: signed bytes. x:
/// unsigned, in shared memory: a column is a row of 128 bytes, its 16-byte chunk c at c ^ (column % 8), eight columns
/// begin at a multiple of 1024; `x` is the first column's place, plus 32 for each 32 of K.
template <int kCols>
CORA_DEVICE void warpgroup_mma8(int32_t (&acc)[1][kCols][4], const uint32_t (&a)[4], const void* x) {
  // Address and distance of eight columns in units of 16 bytes; 128-byte swizzle.
  const uint64_t x_tile =
      (shared_address(x) >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  int32_t (&d)[kCols][4] = acc[0];
#define CORA_ACC(j) "+r"(d[j][0]), "+r"(d[j][1]), "+r"(d[j][2]), "+r"(d[j][3])
#define CORA_ACC8(j)                                                                                                 \
  CORA_ACC(j), CORA_ACC(j + 1), CORA_ACC(j + 2), CORA_ACC(j + 3), CORA_ACC(j + 4), CORA_ACC(j + 5), CORA_ACC(j + 6), \
      CORA_ACC(j + 7)
#define CORA_WGMMA(columns, registers, operands, ...)                                                            \
  asm volatile(                                                                                                  \
      "{\n .reg .pred accumulate;\n setp.eq.u32 accumulate, 0, 0;\n"                                             \
      " wgmma.mma_async.sync.aligned.m64n" columns "k32.s32.s8.u8 {" registers "}, " operands ", accumulate;\n}" \
      : __VA_ARGS__                                                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x_tile)                                                  \
      : "memory")
#define CORA_R32                                           \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define CORA_R64                                                     \
  CORA_R32                                                           \
  ","                                                                \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define CORA_R96                                                     \
  CORA_R64                                                           \
  ","                                                                \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
  static_assert(kCols == 8 || kCols == 16 || kCols == 24);
  if constexpr (kCols == 8)
    CORA_WGMMA("64", CORA_R32, "{%32,%33,%34,%35}, %36", CORA_ACC8(0));
  else if constexpr (kCols == 16)
    CORA_WGMMA("128", CORA_R64, "{%64,%65,%66,%67}, %68", CORA_ACC8(0), CORA_ACC8(8));
  else
    CORA_WGMMA("192", CORA_R96, "{%96,%97,%98,%99}, %100", CORA_ACC8(0), CORA_ACC8(8), CORA_ACC8(16));
#undef CORA_R32
#undef CORA_R64
#undef CORA_R96
#undef CORA_WGMMA
#undef CORA_ACC8
#undef CORA_ACC
}

/// Until at most kLeft of this warpgroup's groups are under way.
template <int kLeft>
CORA_DEVICE void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
/// Keeps the compiler from reading registers that a warpgroup instruction wrote before the wait above this.
CORA_DEVICE void warpgroup_settle(int32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

// --- Host side ------------------------------------------------------------------------------------------------

/// Null, or what went wrong.
inline const char* error_text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

/// Lets the kernel have as much shared memory as a block can get. Always the most, and never less again: another thread
/// may be about to launch it with more than this call needs. Once a kernel and device.
inline cudaError_t raise_shared_limit(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> raised;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error != cudaSuccess || raised.count({kernel, device}) > 0) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) raised.insert({kernel, device});
  return error;
}

/// early: the launch may begin before the one before it has ended, which lets it (let_next_launch_begin).
template <typename... Params, typename... Args>
const char* launch_when(bool early, void (*kernel)(Params...), Dim3 grid, int threads, size_t shared_bytes,
                        void* stream, Args&&... args) {
  if (shared_bytes > 48 * 1024)
    if (const char* error = error_text(raise_shared_limit(reinterpret_cast<const void*>(kernel)))) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = Dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return error_text(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}
template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), Dim3 grid, int threads, size_t shared_bytes, void* stream,
                   Args&&... args) {
  return launch_when(false, kernel, grid, threads, shared_bytes, stream, std::forward<Args>(args)...);
}

inline const char* fill_zero(void* p, size_t bytes, void* stream) {
  return error_text(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)));
}

inline const char* copy_bytes(void* to, const void* from, size_t bytes, void* stream) {
  return error_text(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}

/// Null if the library has code for the current device, or PTX that its driver can compile for it.
inline const char* has_code(void (*kernel)()) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) cudaGetLastError();  // said here, not to whoever asks next
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return "the kernels were not built for this GPU: build cora with its architecture in CORA_CUDA_ARCHS";
  return error_text(error);
}

struct Device {
  int multiprocessors, major, minor;
};
/// The current device.
inline const char* query(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto ask = [&](int* to, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(to, attribute, index);
  };
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->major, cudaDevAttrComputeCapabilityMajor);
  ask(&device->minor, cudaDevAttrComputeCapabilityMinor);
  return error_text(error);
}

}  // namespace cora::cuda

#endif
