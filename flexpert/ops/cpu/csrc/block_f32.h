// Tiles and products in fp32, with AVX-512.
#pragma once
#include "block.h"
#include "transpose.h"
#include "vector.h"

namespace {

using Element = float;

using Piece = Vector;
using PieceSum = Vector;
constexpr index PIECE = 16;

inline Piece load_piece(const float* source, index count) {
  return count >= PIECE ? _mm512_loadu_ps(source) : load_row(source, count);
}

inline Vector dot(Vector sum, Piece a, Piece b) { return _mm512_fmadd_ps(a, b, sum); }

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

constexpr index ABREAST = 2;  // right operands that are multiplied at once
constexpr index RUN = 2;  // k blocks whose right tiles stay in the first-level cache over all rows

// sums += left x right for ROWS rows and one or two right operands: 24 sums in registers at most.
template <index ROWS, index PARTS>
inline void multiply_rows(const float* left, const float* right, index stride, index count, Sums sums, index row,
                          bool add) {
  constexpr index VECTORS = 2 * PARTS;
  Vector sum[ROWS][VECTORS];
  left += row * BLOCK;
  for (index r = 0; r < ROWS; ++r)
    for (index v = 0; v < VECTORS; ++v)
      sum[r][v] = add ? _mm512_load_ps(sums[v / 2] + (row + r) * BLOCK + v % 2 * 16) : _mm512_setzero_ps();
  for (index tile = 0; tile < count; ++tile, left += TILE, right += TILE)
    for (index k = 0; k < 32; ++k) {
      Vector b[VECTORS];
      for (index v = 0; v < VECTORS; ++v) b[v] = _mm512_loadu_ps(right + v / 2 * stride + k * BLOCK + v % 2 * 16);
#pragma GCC unroll 8
      for (index r = 0; r < ROWS; ++r) {
        Vector a = _mm512_set1_ps(left[r * BLOCK + k]);
        __asm__("" : "+v"(a));  // once into a register, not into every product from memory
        for (index v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_fmadd_ps(a, b[v], sum[r][v]);
      }
    }
  for (index r = 0; r < ROWS; ++r)
    for (index v = 0; v < VECTORS; ++v) _mm512_store_ps(sums[v / 2] + (row + r) * BLOCK + v % 2 * 16, sum[r][v]);
}

struct Multiplier {
  static constexpr bool HAS_TILES = false;

  explicit Multiplier(index) {}

  // sums[part] = left x right[part] over `count` k blocks, for the first `rows` rows at least; `work` is called
  // once per part and k block.
  template <typename Work>
  void operator()(const float* left, const float* right, index stride, index parts, index count, Sums sums,
                  index rows, const Work& work) const {
    for (index k = 0; k < count; k += RUN, left += RUN * TILE, right += RUN * TILE) {
      const index depth = least(RUN, count - k);
      for (index i = 0; i < depth * parts; ++i) work();
      if (parts == 1) {
        for (index r = 0; r < rows; r += 8) multiply_rows<8, 1>(left, right, stride, depth, sums, r, k > 0);
      } else {
        index r = 0;
        for (; r < 12 && r < rows; r += 6) multiply_rows<6, 2>(left, right, stride, depth, sums, r, k > 0);
        for (; r < rows; r += 5) multiply_rows<5, 2>(left, right, stride, depth, sums, r, k > 0);
      }
    }
  }
};

}  // namespace
