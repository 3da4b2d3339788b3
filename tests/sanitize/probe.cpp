// Faults on purpose: what proves that a run under the sanitizers would have found one.
#include <cstdint>

extern "C" {

float read_past(const float* x, int64_t count) { return x[count]; }

/// 32 bytes past the end, by an instruction that no sanitizer sees.
void write_past(float* x, int64_t count) {
#if defined(__x86_64__)
  __asm__ volatile("xorps %%xmm0, %%xmm0\n movups %%xmm0, (%0)\n movups %%xmm0, 16(%0)"
                   :
                   : "r"(x + count)
                   : "xmm0", "memory");
#else
  x[count] = 0;
#endif
}

int overflow(int x) { return x + 1; }

}  // extern "C"
