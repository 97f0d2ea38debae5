// Seconds of the kernels' own products on packed operands that lie in the caches: what the rest of a layer is added
// to. Included after the blocks of one dtype, with the flags of the library.
#include <omp.h>

#include <algorithm>
#include <random>
#include <vector>

#include ELEMENT_HEADER

namespace {

Element number(float value) {
  if (sizeof(Element) == 4) return (Element)value;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return (Element)(bits >> 16);
}

struct alignas(64) Sum {
  float at[2][TILE];
};

}  // namespace

// Of `rows` rows by `size` k, times `columns` blocks of 32 columns, on each of `threads` threads: the median of
// `repeats`.
extern "C" double seconds(int64_t rows, int64_t size, int64_t columns, int64_t threads, int64_t amx,
                          int64_t repeats) {
  std::vector<double> times(repeats);
#pragma omp parallel num_threads(threads)
  {
    const index row_blocks = blocks(rows), depth = blocks(size);
    const index height = EVEN ? (rows + row_blocks - 1) / row_blocks : BLOCK;
    const index lefts = row_blocks * depth * TILE, rights = columns * depth * TILE;
    std::vector<Element> memory(lefts + rights + 64);
    Element* left = memory.data();
    while (reinterpret_cast<uintptr_t>(left) % 64) ++left;
    std::minstd_rand generator(omp_get_thread_num() + 1);
    std::normal_distribution<float> normal;
    for (index i = 0; i < lefts + rights; ++i) left[i] = number(normal(generator));
    const Multiplier multiply(amx);
    alignas(64) static thread_local Sum sums;
    for (int64_t repeat = 0; repeat < repeats; ++repeat) {
#pragma omp barrier
      const double begin = omp_get_wtime();
      for (index b = 0; b < row_blocks; ++b)
        for (index c = 0; c < columns; c += ABREAST) {
          Operands<Element> o = {left + b * depth * TILE, left + lefts + c * depth * TILE, depth * TILE,
                                 least(ABREAST, columns - c), size, EVEN ? (size + depth - 1) / depth : BLOCK};
          o.next_left = o.left;
          o.next_right = o.right;
          multiply(o, sums.at, least(height, rows - b * height), [] {});
        }
#pragma omp barrier
#pragma omp master
      times[repeat] = omp_get_wtime() - begin;
    }
  }
  std::sort(times.begin(), times.end());
  return times[repeats / 2];
}
