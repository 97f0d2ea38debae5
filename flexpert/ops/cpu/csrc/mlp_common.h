// What the forward and the backward pass of the grouped MLP share: packing of rows and weights, sums over rows.
#pragma once
#include <algorithm>
#include <cstring>

#include "plan.h"
#include "threads.h"

namespace {

// Pointers to 32 source rows, null past `count`.
struct Rows {
  const Element* at[BLOCK];

  Rows(const Element* base, index stride, index count) {
    for (index i = 0; i < BLOCK; ++i) at[i] = i < count ? base + i * stride : nullptr;
  }
  Rows(const Element* base, index stride, const index* unit, index count) {
    for (index i = 0; i < BLOCK; ++i) at[i] = i < count ? base + unit[i] * stride : nullptr;
  }
};

constexpr index AHEAD = 4 * BLOCK;  // elements of weights asked for before they are needed

inline void prefetch(const Element* address) { _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0); }

// The right operand of 32 columns from `first` on, of weights stored [columns][size of k].
inline void pack_columns(Element* panel, const Element* weights, index columns, index size, index first) {
  const Rows rows(weights + first * size, size, columns - first);
  for (index k = 0; k < size; k += BLOCK, panel += TILE) {
    for (index i = 0; i < least(BLOCK, columns - first); ++i) prefetch(rows.at[i] + k + AHEAD);
    pack_right_transposed(panel, rows.at, k, size - k);
  }
}

// Right operands of 32 columns each, `depth` tiles apart: column blocks first .. first + number of weights
// stored [size of k][columns].
inline void pack_columns_of_k(Element* panels, index depth, const Element* weights, index columns, index size,
                              index first, index number) {
  for (index k = 0; k < size; k += BLOCK, panels += TILE) {
    const Rows rows(weights + k * columns, columns, size - k);
    for (index i = 0; i < number; ++i) {
      const index at = (first + i) * BLOCK;
      for (index r = 0; r < least(BLOCK, size - k); ++r) prefetch(rows.at[r] + BLOCK * columns + at);
      pack_right(panels + i * depth * TILE, rows.at, at, columns - at);
    }
  }
}

// The left operand of one block of gathered rows.
inline void pack_rows(Element* tiles, const Element* source, index size, const index* unit, index count) {
  const Rows rows(source, size, unit, count);
  for (index k = 0; k < size; k += BLOCK, tiles += TILE) pack_left(tiles, rows.at, k, size - k);
}

// target[unit of row][0 .. width) += weight of row * (sums of row + bias), for one block of rows.
inline void scatter_block(float* target, index stride, index width, const float* sums, const RowBlock& rows,
                          const index* unit, const float* weight, const Element* bias) {
  for (index half = 0; half < BLOCK && half < width; half += 16) {
    const index left = width - half;
    const __mmask16 lanes = first_lanes(left);
    const Vector shift = bias ? load_row(bias + half, left) : _mm512_setzero_ps();
    for (index r = 0; r < rows.count; ++r) {
      const index row = rows.start + r;
      float* place = target + unit[row] * stride + half;
      const Vector value = _mm512_add_ps(_mm512_loadu_ps(sums + r * BLOCK + half), shift);
      const Vector factor = _mm512_set1_ps(weight ? weight[row] : 1.0f);
      const Vector before = _mm512_maskz_loadu_ps(lanes, place);
      _mm512_mask_storeu_ps(place, lanes, _mm512_fmadd_ps(value, factor, before));
    }
  }
}

// Inside a parallel region: fill with zeros, all threads together.
inline void clear(void* target, index bytes) {
  constexpr index CHUNK = 1 << 18;
#pragma omp for schedule(static) nowait
  for (index first = 0; first < bytes; first += CHUNK)
    std::memset(static_cast<char*>(target) + first, 0, least(CHUNK, bytes - first));
}

// Fresh memory of an output costs most at its first touch, less so in large pages.
inline void prefer_huge_pages(index address, index bytes) {
  constexpr index PAGE = index(2) << 20;
  const index first = (address + PAGE - 1) / PAGE * PAGE, last = (address + bytes) / PAGE * PAGE;
  if (address && last > first) madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);
}

// Inside a parallel region: the sums in the type of the result, unless they are the result.
inline void finish(Element* result, const float* sums, index size) {
  if (static_cast<const void*>(result) == sums) return;
#pragma omp for schedule(static)
  for (index first = 0; first < size; first += 16)
    store_row(result + first, _mm512_maskz_loadu_ps(first_lanes(size - first), sums + first), size - first);
}

constexpr index WIDEST = sizeof(Element) == 2 ? 8 : 4;

// Column blocks a task works on, so that packed rows are read once for all of them: as many as leave each
// thread some tasks to choose from.
inline index task_width(index column_blocks, index threads) {
  return std::max<index>(1, least(WIDEST, column_blocks / (2 * threads)));
}

}  // namespace
