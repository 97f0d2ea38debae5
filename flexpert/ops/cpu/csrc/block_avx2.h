// What the tiles of both dtypes share with AVX2: products in fp32, on operands that `Wide` turns into floats.
//
// Tiles are [32 rows][32 k] of a left operand and [32 k][32 columns] of a right one.
#pragma once
#include "block.h"
#include "vector.h"

namespace {

constexpr index ABREAST = 1;  // right operands that are multiplied at once
constexpr bool TURNED = false, EVEN = false;
constexpr index RUN = 2;  // k blocks whose tiles stay in the first-level cache over all rows

// sums += left x right for ROWS rows and 16 columns: 12 sums in registers at most.
template <index ROWS>
inline void multiply_rows(const float* left, const float* right, index depth, float* sums, bool add) {
  __m256 low[ROWS], high[ROWS];
  for (index r = 0; r < ROWS; ++r) {
    low[r] = add ? _mm256_load_ps(sums + r * BLOCK) : _mm256_setzero_ps();
    high[r] = add ? _mm256_load_ps(sums + r * BLOCK + 8) : _mm256_setzero_ps();
  }
  for (; depth > 0; depth -= BLOCK, left += TILE, right += TILE)
    for (index k = 0; k < least(depth, BLOCK); ++k) {
      const __m256 b_low = _mm256_loadu_ps(right + k * BLOCK), b_high = _mm256_loadu_ps(right + k * BLOCK + 8);
#pragma GCC unroll 6
      for (index r = 0; r < ROWS; ++r) {
        const __m256 a = _mm256_broadcast_ss(left + r * BLOCK + k);
        low[r] = _mm256_fmadd_ps(a, b_low, low[r]);
        high[r] = _mm256_fmadd_ps(a, b_high, high[r]);
      }
    }
  for (index r = 0; r < ROWS; ++r) {
    _mm256_store_ps(sums + r * BLOCK, low[r]);
    _mm256_store_ps(sums + r * BLOCK + 8, high[r]);
  }
}

// `Wide(tiles, count, rows)` has the first `rows` rows of the tiles as floats, in tiles.
template <typename Element, typename Wide>
struct ProductsOfFloats {
  static constexpr bool HAS_TILES = false;

  explicit ProductsOfFloats(index) {}

  // sums[part] = left x right[part] for the first `rows` rows at least; `work` is called once per part and k block.
  template <typename Work>
  void operator()(const Operands<Element>& o, Sums sums, index rows, const Work& work) const {
    const Element *left = o.left, *right = o.right;
    for (index k = 0; k < o.k; k += RUN * BLOCK, left += RUN * TILE, right += RUN * TILE) {
      const index depth = least(RUN * BLOCK, o.k - k), tiles = blocks(depth);
      for (index i = 0; i < tiles * o.parts; ++i) work();
      const Wide wide_left(left, tiles, least(BLOCK, rows + 5));  // those that are multiplied
      for (index part = 0; part < o.parts; ++part) {
        const Wide wide_right(right + part * o.apart, tiles, BLOCK);
        for (index half = 0; half < BLOCK; half += 16)
          multiply(wide_left.tiles, wide_right.tiles + half, depth, sums[part] + half, rows, k > 0);
      }
    }
  }

 private:
  static void multiply(const float* left, const float* right, index depth, float* sums, index rows, bool add) {
    index r = 0;
    for (; r < 12 && r < rows; r += 6) multiply_rows<6>(left + r * BLOCK, right, depth, sums + r * BLOCK, add);
    for (; r < rows; r += 5) multiply_rows<5>(left + r * BLOCK, right, depth, sums + r * BLOCK, add);
  }
};

}  // namespace
