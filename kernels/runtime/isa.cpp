// Which levels this processor can run, and which of them pay off.
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

bool is(const char* a, const char* b) { return strcmp(a, b) == 0; }

#if defined(__x86_64__)
// The built-in checks include whether the operating system saves the registers.
bool has_avx2() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int kvrun_can_run(const char* level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (is(level, "avx2")) return has_avx2();
  if (is(level, "avx512")) return has_avx512();
  if (is(level, "avx512_bf16")) return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
  return is(level, "generic");
}

// The bf16 dot product runs at twice the rate of float32 FMA on AMD's cores, and at half of it on Intel's. The answer
// may not come from a measurement: it decides bits, and a restarted shard must repeat them.
EXPORT int kvrun_prefers(const char* level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (is(level, "avx512_bf16")) return kvrun_can_run(level) && __builtin_cpu_is("amd");
#endif
  return kvrun_can_run(level);
}
