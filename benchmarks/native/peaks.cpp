// The speeds a kernel is held against, measured on this machine in this run: dot products a second
// in float32 (FMA), int8 (AVX2, there by 4-bit weights too, AVX-512 VNNI, AMX) and bfloat16 (AMX), and bytes a second
// read from and streamed to memory. Prints one "name threads value" a line; GOP/s (a multiply-add is two) and GB/s.
//
// usage: peaks MEBIBYTES THREADS...   (size of the array that bandwidth is measured on)
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr int kRounds = 7;

// Best of the rounds: a peak is what the machine can do, not what it does on average.
double best_seconds(int threads, const std::function<void(int)>& work) {
  double best = 1e30;
  for (int round = 0; round < kRounds; ++round) {
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
    work(0);
    for (auto& thread : pool) thread.join();
    std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    best = std::min(best, spent.count());
  }
  return best;
}

// 16 independent accumulators hide the latency of two pipes. The empty asm keeps each in a register
// and the loop from being folded.
#define CORA_EACH8(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define CORA_EACH16(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

constexpr int64_t kSteps = 6'000'000;

// AVX2 has 16 registers: ten accumulators hide the latency of two pipes, eight of three instructions each do too.
__attribute__((target("avx2,fma"))) void run_fma_avx2(int) {
  __m256 y = _mm256_set1_ps(0.5f);
#define CORA_DECLARE(i) __m256 a##i = _mm256_set1_ps(i);
#define CORA_STEP(i)                  \
  a##i = _mm256_fmadd_ps(a##i, y, y); \
  asm volatile("" : "+x"(a##i));
  CORA_EACH8(CORA_DECLARE) CORA_DECLARE(8) CORA_DECLARE(9) for (int64_t step = 0; step < kSteps; ++step) {
    CORA_EACH8(CORA_STEP) CORA_STEP(8) CORA_STEP(9)
  }
#undef CORA_DECLARE
#undef CORA_STEP
}

// A dot product of bytes takes three instructions: pairs to 16 bits, their pairs to 32, and the sum.
__attribute__((target("avx2"))) void run_int8_avx2(int) {
  __m256i y = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
#define CORA_DECLARE(i) __m256i a##i = _mm256_set1_epi32(i);
#define CORA_STEP(i)                                                                  \
  asm volatile("" : "+x"(y));                                                         \
  a##i = _mm256_add_epi32(a##i, _mm256_madd_epi16(_mm256_maddubs_epi16(y, y), ones)); \
  asm volatile("" : "+x"(a##i));
  CORA_EACH8(CORA_DECLARE)
  for (int64_t step = 0; step < kSteps; ++step) {
    CORA_EACH8(CORA_STEP)
  }
#undef CORA_DECLARE
#undef CORA_STEP
}

// Of 4-bit weights (below 11, as most are without their zero-point) six sums of pairs fit 16 bits before they are
// widened: 2.2 instructions.
__attribute__((target("avx2"))) void run_int4_avx2(int) {
  __m256i y = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
#define CORA_EACH6(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define CORA_DECLARE(i) __m256i s##i, a##i = _mm256_set1_epi32(i);
#define CORA_FIRST(i)         \
  asm volatile("" : "+x"(y)); \
  s##i = _mm256_maddubs_epi16(y, y);
#define CORA_STEP(i)                                         \
  asm volatile("" : "+x"(y));                                \
  s##i = _mm256_add_epi16(s##i, _mm256_maddubs_epi16(y, y)); \
  asm volatile("" : "+x"(s##i));
#define CORA_LAST(i)                                            \
  a##i = _mm256_add_epi32(a##i, _mm256_madd_epi16(s##i, ones)); \
  asm volatile("" : "+x"(a##i));
  CORA_EACH6(CORA_DECLARE)
  for (int64_t step = 0; step < kSteps / 4; ++step) {
    CORA_EACH6(CORA_FIRST)
    CORA_EACH6(CORA_STEP)
    CORA_EACH6(CORA_STEP) CORA_EACH6(CORA_STEP) CORA_EACH6(CORA_STEP) CORA_EACH6(CORA_STEP) CORA_EACH6(CORA_LAST)
  }
#undef CORA_DECLARE
#undef CORA_FIRST
#undef CORA_STEP
#undef CORA_LAST
}

__attribute__((target("avx512f"))) void run_fma(int) {
  __m512 y = _mm512_set1_ps(0.5f);
#define CORA_DECLARE(i) __m512 a##i = _mm512_set1_ps(i);
#define CORA_STEP(i)                  \
  a##i = _mm512_fmadd_ps(a##i, y, y); \
  asm volatile("" : "+v"(a##i));
  CORA_EACH16(CORA_DECLARE)
  for (int64_t step = 0; step < kSteps; ++step) {
    CORA_EACH16(CORA_STEP)
  }
#undef CORA_DECLARE
#undef CORA_STEP
}

__attribute__((target("avx512f,avx512vnni"))) void run_vnni(int) {
  __m512i y = _mm512_set1_epi8(1);
#define CORA_DECLARE(i) __m512i a##i = _mm512_set1_epi32(i);
#define CORA_STEP(i)                      \
  a##i = _mm512_dpbusd_epi32(a##i, y, y); \
  asm volatile("" : "+v"(a##i));
  CORA_EACH16(CORA_DECLARE)
  for (int64_t step = 0; step < kSteps; ++step) {
    CORA_EACH16(CORA_STEP)
  }
#undef CORA_DECLARE
#undef CORA_STEP
}

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

bool allow_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

__attribute__((target("amx-tile"))) void configure_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  asm volatile("" ::"r"(&config) : "memory");  // g++ 12 thinks the load reads 8 bytes and drops the rest
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

__attribute__((target("amx-tile,amx-int8"))) void run_amx_int8(int) {
  configure_tiles();
  for (int64_t step = 0; step < kSteps / 4; ++step) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}

__attribute__((target("amx-tile,amx-bf16"))) void run_amx_bf16(int) {
  configure_tiles();
  for (int64_t step = 0; step < kSteps / 4; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

// Reading with 1, 2, 4 or 8 streams a thread, with or without software prefetch: how many lines are
// in flight decides the speed of one core, and which way is fastest differs from machine to machine.
__attribute__((target("avx2"))) int64_t read_lines(const char* data, int64_t bytes, int streams, int64_t ahead) {
  __m256i sum[8] = {};
  int64_t part = bytes / streams;
  for (int64_t i = 0; i < part; i += 256)
    for (int s = 0; s < streams; ++s) {
      const char* line = data + s * part + i;
      for (int j = 0; j < 8; ++j) {
        if (ahead && j % 2 == 0) _mm_prefetch(line + ahead + 32 * j, _MM_HINT_T0);
        sum[j] = _mm256_add_epi32(sum[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(line + 32 * j)));
      }
    }
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_add_epi32(sum[0], sum[j]);
  return _mm256_extract_epi32(sum[0], 0);
}

// One element read and two written past the caches: what fake_quantize with a residual moves.
__attribute__((target("avx2"))) void stream(const char* from, char* to, char* too, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 32) {
    __m256i line = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), line);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(too + i), line);
  }
  _mm_sfence();
}

char* allocate(int64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::exit(1);
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  return static_cast<char*>(memory);
}

void print(const char* name, int threads, double value) { std::printf("%s %d %.2f\n", name, threads, value); }

}  // namespace

int main(int count, char** words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: peaks MEBIBYTES THREADS...\n");
    return 2;
  }
  int64_t bytes = std::atoll(words[1]) << 20;
  char* data = allocate(bytes + 65536);
  bool amx = allow_amx(), avx512 = __builtin_cpu_supports("avx512f");
  for (int i = 2; i < count; ++i) {
    int threads = std::atoi(words[i]);
    auto rate = [&](double operations, double seconds) { return operations * threads / seconds / 1e9; };
    if (!avx512 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) continue;
    if (avx512) {
      print("f32", threads, rate(2.0 * 16 * 16 * kSteps, best_seconds(threads, run_fma)));
    } else {
      print("f32", threads, rate(2.0 * 10 * 8 * kSteps, best_seconds(threads, run_fma_avx2)));
      print("avx2_int8", threads, rate(2.0 * 8 * 32 * kSteps, best_seconds(threads, run_int8_avx2)));
      print("avx2_int4", threads, rate(2.0 * 6 * 6 * 32 * (kSteps / 4), best_seconds(threads, run_int4_avx2)));
    }
    if (__builtin_cpu_supports("avx512vnni"))
      print("vnni", threads, rate(2.0 * 16 * 64 * kSteps, best_seconds(threads, run_vnni)));
    if (amx) {
      print("amx_int8", threads, rate(2.0 * 16 * 16 * 64 * kSteps, best_seconds(threads, run_amx_int8)));
      print("amx_bf16", threads, rate(2.0 * 16 * 16 * 32 * kSteps, best_seconds(threads, run_amx_bf16)));
    }
    double most = 0;
    volatile int64_t sink = 0;
    for (int streams : {1, 2, 4, 8})
      for (int64_t ahead : {0, 1024, 4096}) {
        int64_t share = bytes / threads / 4096 * 4096;
        double seconds =
            best_seconds(threads, [&](int t) { sink = read_lines(data + t * share, share, streams, ahead); });
        double speed = share * threads / seconds / 1e9;
        if (std::getenv("PEAKS_VERBOSE")) std::printf("# read %d %d %ld %.2f\n", threads, streams, long(ahead), speed);
        most = std::max(most, speed);
      }
    print("read", threads, most);
    int64_t third = bytes / 3 / threads / 4096 * 4096;
    double seconds = best_seconds(threads, [&](int t) {
      char* from = data + 3 * t * third;
      stream(from, from + third, from + 2 * third, third);
    });
    print("read1_write2", threads, 3 * third * threads / seconds / 1e9);
  }
}
