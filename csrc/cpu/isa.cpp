#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if CORA_X86
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cora::cpu {

namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avxvnni", "avx512", "amx"};

#if CORA_X86
// Compilers do not know all of these by name.
bool has_avxvnni() {
#ifdef CORA_EMULATED_AVXVNNI
  return true;
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
}

/// AVX-512 BF16, AMX int8 and bf16.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
  return tiles && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

/// Linux gives a process the tile registers on request.
bool amx_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool supported(Isa isa) {
  if (isa == Isa::kScalar) return true;
#if CORA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  switch (isa) {
    case Isa::kAvx2: return avx2;
    case Isa::kAvxVnni: return avx2 && has_avxvnni();
    case Isa::kAvx512: return avx2 && avx512;
    case Isa::kAmx: return avx2 && avx512 && has_amx() && amx_permitted();
    default: return false;
  }
#else
  return false;
#endif
}

Isa detect() {
  int best = kIsaCount - 1;
  while (!supported(static_cast<Isa>(best))) --best;
  return static_cast<Isa>(best);
}

Isa parse(const std::string& name, const char* source) {
  std::string valid;
  for (int i = 0; i < kIsaCount; ++i) {
    if (!supported(static_cast<Isa>(i))) continue;
    if (name == kNames[i]) return static_cast<Isa>(i);
    valid += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::runtime_error("cora: " + std::string(source) + " must be one of {" + valid + "} on this CPU, got '" +
                           name + "'");
}

std::atomic<int> g_active{-1};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa active_isa() {
  int active = g_active.load(std::memory_order_relaxed);
  if (active < 0) {
    const char* forced = std::getenv("CORA_ISA");
    const Isa isa = forced != nullptr && *forced != '\0' ? parse(forced, "CORA_ISA") : detect();
    active = static_cast<int>(isa);
    g_active.store(active, std::memory_order_relaxed);
  }
  return static_cast<Isa>(active);
}

void set_active_isa(const std::string& name) {
  g_active.store(static_cast<int>(parse(name, "set_isa")), std::memory_order_relaxed);
}

}  // namespace cora::cpu
