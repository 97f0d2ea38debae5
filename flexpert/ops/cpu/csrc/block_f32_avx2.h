// Tiles and products in fp32, with AVX2.
#pragma once
#include "block_avx2.h"

namespace {

using Element = float;

using Piece = __m256;
using PieceSum = __m256;
constexpr index PIECE = 8;

inline Piece load_piece(const float* source, index count) {
  return count >= PIECE ? _mm256_loadu_ps(source) : _mm256_maskload_ps(source, first_of_8(count));
}

inline PieceSum dot(PieceSum sum, Piece a, Piece b) { return _mm256_fmadd_ps(a, b, sum); }

// 32 numbers, and past the caches where the lines are whole: `streams` says so for a whole target.
inline void store_32(float* target, Vector low, Vector high, index count, bool streams = false) {
  if (count >= 32 && streams) {
    _mm256_stream_ps(target, low.low);
    _mm256_stream_ps(target + 8, low.high);
    _mm256_stream_ps(target + 16, high.low);
    _mm256_stream_ps(target + 24, high.high);
  } else {
    store_row(target, low, count);
    store_row(target + 16, high, count - 16);
  }
}

// Rows stay rows: a left operand from its rows, or a right one from its k.
inline void pack_left(float* tile, const float* const* rows, index first, index width) {
  for (index r = 0; r < BLOCK; ++r)
    for (index half = 0; half < BLOCK; half += 16)
      store_row(tile + r * BLOCK + half,
                rows[r] ? load_row(rows[r] + first + half, width - half) : constant(0.0f), 16);
}

inline void transpose(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // r[i + j] holds column j, and 4 + j, of rows i to i + 3
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m256 upper = r[i], lower = r[4 + i];
    r[i] = _mm256_permute2f128_ps(upper, lower, 0x20);
    r[4 + i] = _mm256_permute2f128_ps(upper, lower, 0x31);
  }
}

// Rows become columns: a left operand from its k, or a right one from its columns.
inline void pack_left_transposed(float* tile, const float* const* rows, index first, index width) {
  for (index row = 0; row < BLOCK; row += 8)
    for (index column = 0; column < BLOCK; column += 8) {
      __m256 square[8];
      for (index i = 0; i < 8; ++i) {
        const float* source = rows[row + i];
        square[i] = source ? load_piece(source + first + column, width - column) : _mm256_setzero_ps();
      }
      transpose(square);
      for (index i = 0; i < 8; ++i) _mm256_storeu_ps(tile + (column + i) * BLOCK + row, square[i]);
    }
}

inline void pack_right(float* tile, const float* const* rows, index first, index width) {
  pack_left(tile, rows, first, width);
}

inline void pack_right_transposed(float* tile, const float* const* rows, index first, index width) {
  pack_left_transposed(tile, rows, first, width);
}

struct AsTheyAre {
  const float* tiles;
  AsTheyAre(const float* tiles, index, index) : tiles(tiles) {}
};

using Multiplier = ProductsOfFloats<float, AsTheyAre>;

}  // namespace
