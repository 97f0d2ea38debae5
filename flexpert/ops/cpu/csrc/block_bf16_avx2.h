// Tiles and products of bf16 in fp32, with AVX2: widened by a shift, narrowed to the nearest, of two the even one.
#pragma once
#include "block_avx2.h"

namespace {

using Element = uint16_t;

// 16 numbers, those at even places and those at odd ones: their sums need no order.
struct Piece {
  __m256 even, odd;
};
using PieceSum = __m256;
constexpr index PIECE = 16;

inline Piece load_piece(const Element* source, index count) {
  const __m256i value = load_16(source, count);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(value, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(value, _mm256_set1_epi32(-65536)))};
}

inline PieceSum dot(PieceSum sum, Piece a, Piece b) {
  return _mm256_fmadd_ps(a.odd, b.odd, _mm256_fmadd_ps(a.even, b.even, sum));
}

inline void store_row(Element* target, Vector value, index count) { store_16(target, narrow(value), count); }

// 32 numbers, and past the caches where the line is whole: `streams` says so for a whole target.
inline void store_32(Element* target, Vector low, Vector high, index count, bool streams = false) {
  if (count >= 32 && streams) {
    auto* halves = reinterpret_cast<__m256i*>(target);
    _mm256_stream_si256(halves, narrow(low));
    _mm256_stream_si256(halves + 1, narrow(high));
  } else {
    store_row(target, low, count);
    store_row(target + 16, high, count - 16);
  }
}

// Rows stay rows: a left operand from its rows, or a right one from its k.
inline void pack_left(Element* tile, const Element* const* rows, index first, index width) {
  for (index r = 0; r < BLOCK; ++r)
    for (index half = 0; half < BLOCK; half += 16) {
      const __m256i value = rows[r] ? load_16(rows[r] + first + half, width - half) : _mm256_setzero_si256();
      store_16(tile + r * BLOCK + half, value, 16);
    }
}

// 8 columns of 16 rows, from rows 0 to 7 in the low halves and 8 to 15 in the high ones.
inline void transpose(__m256i (&r)[8]) {
  __m256i t[8];
  for (int i = 0; i < 4; ++i) {  // pairs of rows
    t[2 * i] = _mm256_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)  // fours of rows: r[4 i + j] has columns 2 j and 2 j + 1
    for (int j = 0; j < 2; ++j) {
      r[4 * i + 2 * j] = _mm256_unpacklo_epi32(t[4 * i + j], t[4 * i + 2 + j]);
      r[4 * i + 2 * j + 1] = _mm256_unpackhi_epi32(t[4 * i + j], t[4 * i + 2 + j]);
    }
  for (int j = 0; j < 4; ++j) {
    t[2 * j] = _mm256_unpacklo_epi64(r[j], r[4 + j]);
    t[2 * j + 1] = _mm256_unpackhi_epi64(r[j], r[4 + j]);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

inline __m256i load_8_and_8(const Element* low, const Element* high) {
  const auto *first = reinterpret_cast<const __m128i*>(low), *second = reinterpret_cast<const __m128i*>(high);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(first)), _mm_loadu_si128(second), 1);
}

// Rows become columns: a left operand from its k, or a right one from its columns.
inline void pack_left_transposed(Element* tile, const Element* const* rows, index first, index width) {
  alignas(64) Element padded[TILE];
  const Element* source[BLOCK];
  bool is_whole = width >= BLOCK;
  for (index r = 0; r < BLOCK; ++r) is_whole = is_whole && rows[r];
  if (!is_whole) pack_left(padded, rows, first, width);
  for (index r = 0; r < BLOCK; ++r) source[r] = is_whole ? rows[r] + first : padded + r * BLOCK;
  for (index row = 0; row < BLOCK; row += 16)
    for (index column = 0; column < BLOCK; column += 8) {
      __m256i square[8];
      for (index i = 0; i < 8; ++i)
        square[i] = load_8_and_8(source[row + i] + column, source[row + 8 + i] + column);
      transpose(square);
      for (index i = 0; i < 8; ++i) store_16(tile + (column + i) * BLOCK + row, square[i], 16);
    }
}

inline void pack_right(Element* tile, const Element* const* rows, index first, index width) {
  pack_left(tile, rows, first, width);
}

inline void pack_right_transposed(Element* tile, const Element* const* rows, index first, index width) {
  pack_left_transposed(tile, rows, first, width);
}

struct Widened {
  alignas(64) float tiles[RUN * TILE];

  Widened(const Element* from, index count, index rows) {
    for (index tile = 0; tile < count; ++tile)
      for (index i = tile * TILE; i < tile * TILE + rows * BLOCK; i += 16)
        store(tiles + i, load_row(from + i, 16));
  }
};

using Multiplier = ProductsOfFloats<Element, Widened>;

}  // namespace
