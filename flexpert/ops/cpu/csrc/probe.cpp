// What the processor and the kernel of the system offer; compiled without any of it.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {

bool is_set(unsigned value, int bit) { return (value >> bit) & 1; }

uint64_t enabled_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Linux hands out the tile registers on request only, for the whole process and its children.
bool is_granted_tiles() {
  constexpr long REQUEST = 0x1023, GET = 0x1022, TILE_DATA = 18;
  unsigned long granted = 0;
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0 &&
         syscall(SYS_arch_prctl, GET, &granted) == 0 && ((granted >> TILE_DATA) & 1);
}

}  // namespace

// Bit 0: AVX-512 F, BW, DQ, VL. Bit 1: AVX-512 BF16. Bit 2: AMX bf16, granted. Bit 3: AVX2 and FMA.
extern "C" int64_t flexpert_features() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !is_set(c, 27)) return 0;
  const bool has_fma = is_set(c, 12);
  const uint64_t states = enabled_states();
  if ((states & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  int64_t found = has_fma && is_set(b, 5) ? 8 : 0;
  const bool has_avx512 = is_set(b, 16) && is_set(b, 17) && is_set(b, 30) && is_set(b, 31);
  if (!has_fma || !has_avx512 || (states & 0xe6) != 0xe6) return found;
  found |= 1;
  const bool has_tiles = is_set(d, 22) && is_set(d, 24) && (states & 0x60000) == 0x60000;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && is_set(a, 5)) {
    found |= 2;
    if (has_tiles && is_granted_tiles()) found |= 4;
  }
  return found;
}
