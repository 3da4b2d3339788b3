// CPU levels and the choice of kernels at run time. Only isa.cpp reads CPUID and CORA_ISA.
#pragma once

#include <cstddef>
#include <string>

namespace cora::cpu {

/// kAvx512: F, BW, DQ, VL, VNNI, VBMI. kAmx: kAvx512 and AVX-512 BF16, AMX int8 and bf16. Each CPU has the levels below
/// its best, but for kAvxVnni, whose instruction many with AVX-512 have in another encoding only.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512 = 3, kAmx = 4 };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);
/// The level in force: the best the CPU has, capped by CORA_ISA or set_active_isa().
Isa active_isa();
/// Throws std::runtime_error naming the valid levels when `name` is unknown or unsupported here.
void set_active_isa(const std::string& name);

/// One kernel's implementations by level; nullptr means "the next lower level's".
template <typename Fn>
struct KernelTable {
  const char* name;
  Fn* kernels[kIsaCount];

  Isa level(Isa isa) const {
    int i = static_cast<int>(isa);
    while (i > 0 && kernels[i] == nullptr) --i;
    return static_cast<Isa>(i);
  }
  Fn* at(Isa isa) const { return kernels[static_cast<int>(level(isa))]; }
  Fn* operator()() const { return at(active_isa()); }
};

}  // namespace cora::cpu

// Code between BEGIN and END may use the level's instructions; nothing else in the file does, so no
// inline function of a header is ever emitted with instructions that an older CPU lacks (which is
// what per-file -m flags do). Include everything before BEGIN; one region a file.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CORA_X86 1
#define CORA_PRAGMA(x) _Pragma(#x)
// clang-format off
#if defined(__clang__)
#define CORA_BEGIN_AVX2 \
  CORA_PRAGMA(clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function))
#define CORA_BEGIN_AVXVNNI \
  CORA_PRAGMA(clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avxvnni"))), apply_to = function))
#define CORA_BEGIN_AVX512                                                                              \
  CORA_PRAGMA(clang attribute push(                                                                    \
      __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"))), \
      apply_to = function))
#define CORA_BEGIN_AMX                                                                                \
  CORA_PRAGMA(clang attribute push(                                                                   \
      __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,"   \
                            "avx512vbmi,avx512bf16,amx-tile,amx-int8,amx-bf16"))),                    \
      apply_to = function))
#define CORA_END_TARGET CORA_PRAGMA(clang attribute pop)
#else
#define CORA_BEGIN_AVX2 CORA_PRAGMA(GCC push_options) CORA_PRAGMA(GCC target("avx2,fma,f16c,bmi,bmi2"))
#define CORA_BEGIN_AVXVNNI CORA_PRAGMA(GCC push_options) CORA_PRAGMA(GCC target("avx2,fma,f16c,bmi,bmi2,avxvnni"))
// g++ 12's own avx512fintrin.h trips both warnings.
#define CORA_BEGIN_AVX512                                     \
  CORA_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized") \
  CORA_PRAGMA(GCC diagnostic ignored "-Wuninitialized")       \
  CORA_PRAGMA(GCC push_options)                               \
  CORA_PRAGMA(GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"))
#define CORA_BEGIN_AMX                                        \
  CORA_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized") \
  CORA_PRAGMA(GCC diagnostic ignored "-Wuninitialized")       \
  CORA_PRAGMA(GCC push_options)                               \
  CORA_PRAGMA(GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,amx-tile,amx-int8,amx-bf16"))
#define CORA_END_TARGET CORA_PRAGMA(GCC pop_options)
#endif
// clang-format on
#else
#define CORA_X86 0
#endif
