// Tiles and products in fp32, with AVX-512.
#pragma once
#include <immintrin.h>

#include "block.h"
#include "transpose.h"

namespace {

using Element = float;

inline __mmask16 first_lanes(index count) {
  return count <= 0 ? 0 : count >= 16 ? 0xffff : (1u << count) - 1;
}

inline Vector load_row(const float* source, index count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), source);
}

inline void store_row(float* target, Vector value, index count) {
  _mm512_mask_storeu_ps(target, first_lanes(count), value);
}

// 32 numbers, and past the caches where the lines are whole: `streams` says so for a whole target.
inline void store_32(float* target, Vector low, Vector high, index count, bool streams = false) {
  if (count < 32) {
    store_row(target, low, count);
    store_row(target + 16, high, count - 16);
  } else if (streams) {
    _mm512_stream_ps(target, low);
    _mm512_stream_ps(target + 16, high);
  } else {
    _mm512_storeu_ps(target, low);
    _mm512_storeu_ps(target + 16, high);
  }
}

// Rows stay rows: a left operand from its rows, or a right one from its k.
inline void pack_left(float* tile, const float* const* rows, index first, index width) {
  for (index r = 0; r < BLOCK; ++r)
    for (index half = 0; half < 32; half += 16) {
      const Vector value = rows[r] ? load_row(rows[r] + first + half, width - half) : _mm512_setzero_ps();
      _mm512_storeu_ps(tile + r * BLOCK + half, value);
    }
}

// Rows become columns: a left operand from its k, or a right one from its columns.
inline void pack_left_transposed(float* tile, const float* const* rows, index first, index width) {
  for (index row = 0; row < 32; row += 16)
    for (index column = 0; column < 32; column += 16) {
      __m512i square[16];
      for (index i = 0; i < 16; ++i) {
        const float* source = rows[row + i];
        const Vector value = source ? load_row(source + first + column, width - column) : _mm512_setzero_ps();
        square[i] = _mm512_castps_si512(value);
      }
      transpose(square);
      for (index i = 0; i < 16; ++i) _mm512_storeu_si512(tile + (column + i) * BLOCK + row, square[i]);
    }
}

inline void pack_right(float* tile, const float* const* rows, index first, index width) {
  pack_left(tile, rows, first, width);
}

inline void pack_right_transposed(float* tile, const float* const* rows, index first, index width) {
  pack_left_transposed(tile, rows, first, width);
}

constexpr index RUN = 4;  // k blocks whose right tiles stay in the first-level cache over all rows

inline void multiply_rows(const float* left, const float* right, index count, float* sums, bool add) {
  Vector sum[8][2];
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 2; ++c)
      sum[r][c] = add ? _mm512_loadu_ps(sums + r * BLOCK + c * 16) : _mm512_setzero_ps();
  for (index tile = 0; tile < count; ++tile, left += TILE, right += TILE)
    for (int k = 0; k < 32; ++k) {
      const Vector b0 = _mm512_loadu_ps(right + k * BLOCK), b1 = _mm512_loadu_ps(right + k * BLOCK + 16);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        Vector a = _mm512_set1_ps(left[r * BLOCK + k]);
        __asm__("" : "+v"(a));  // once into a register, not into both products from memory
        sum[r][0] = _mm512_fmadd_ps(a, b0, sum[r][0]);
        sum[r][1] = _mm512_fmadd_ps(a, b1, sum[r][1]);
      }
    }
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 2; ++c) _mm512_storeu_ps(sums + r * BLOCK + c * 16, sum[r][c]);
}

struct Multiplier {
  explicit Multiplier(index) {}

  // sums[32][32] = left x right over `count` k blocks, for the first `rows` rows at least; `work` is called once
  // per k block.
  template <typename Work>
  void operator()(const float* left, const float* right, index count, float* sums, index rows,
                  const Work& work) const {
    for (index k = 0; k < count; k += RUN) {
      for (index i = k; i < least(k + RUN, count); ++i) work();
      for (index r = 0; r < rows; r += 8)
        multiply_rows(left + k * TILE + r * BLOCK, right + k * TILE, least(RUN, count - k), sums + r * BLOCK,
                      k > 0);
    }
  }
};

}  // namespace
