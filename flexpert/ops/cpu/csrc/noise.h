// Noise by a hash of counters: the finaliser of SplitMix64 twice, see flexpert/routers/noise.py.
#pragma once
#include "calls.h"
#include "threads.h"

namespace {

struct UniformCall {
  index count, threads, key, counter, result;
};

inline uint64_t mix(uint64_t z) {
  z *= 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// Values in (0, 1) of 23 bits, one per counter.
inline void uniform(const UniformCall& c) {
  constexpr index LITTLE = 1 << 14;
  const uint64_t* counter = pointer<uint64_t>(c.counter);
  float* result = pointer<float>(c.result);
  on_threads(c.count < LITTLE ? 1 : c.threads, [&] {
#pragma omp for schedule(static)
    for (index i = 0; i < c.count; ++i)
      result[i] = (float(mix(mix(counter[i]) + uint64_t(c.key)) >> 41) + 0.5f) * 0x1p-23f;
  });
}

}  // namespace
