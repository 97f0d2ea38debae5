// Products of few rows, for one thread's own experts in fp32 with AVX-512: weights are packed a piece at a time into
// the first-level cache, where all rows meet it before the next one is packed. Panels of whole columns, which pay off
// with many rows, go to the second-level cache and come back once per block of rows.
#pragma once
#include "mlp_common.h"

namespace {

constexpr index PIECE_BLOCKS = 4, PIECE_K = PIECE_BLOCKS * BLOCK;

// Weights stored [columns][size of k]: those of the forward pass.
struct ByColumn {
  const Element* weights;
  index columns, size;

  // The right operand of k `at` .. `at` + `count` and 32 columns.
  void pack(Element* tiles, index column, index at, index count) const {
    const Rows rows(weights + column * BLOCK * size + at, size, columns - column * BLOCK);
    for (index k = 0; k < count; k += BLOCK, tiles += TILE) pack_right_transposed(tiles, rows.at, k, count - k);
  }

  // What packing a piece reads.
  Area piece(index column, index at) const {
    const index bytes = least(PIECE_K, size - at) * sizeof(Element), stride = size * sizeof(Element);
    return {weights + column * BLOCK * size + at, bytes, stride, least(ABREAST * BLOCK, columns - column * BLOCK)};
  }
};

// Weights stored [size of k][columns]: those of the backward pass.
struct ByK {
  const Element* weights;
  index columns, size;

  void pack(Element* tiles, index column, index at, index count) const {
    const index first = column * BLOCK;
    for (index k = 0; k < count; k += BLOCK, tiles += TILE) {
      const Rows rows(weights + (at + k) * columns, columns, count - k);
      pack_right(tiles, rows.at, first, columns - first);
    }
  }

  Area piece(index column, index at) const {
    const index bytes = least(ABREAST * BLOCK, columns - column * BLOCK) * sizeof(Element);
    const index stride = columns * sizeof(Element);
    return {weights + at * columns + column * BLOCK, bytes, stride, least(PIECE_K, size - at)};
  }
};

class Strips {
 public:
  Strips(const Multiplier& multiply, const Wave& wave) : multiply(multiply), wave(wave) {}

  // Whether a wave of one thread's own is computed so.
  static bool fit(const Wave& wave) { return TURNED && (index)wave.rows.size() <= MOST_BLOCKS; }

  // The products of all rows, whose left operands follow `left`, with ABREAST column blocks from `column` on; all their
  // epilogues, `epilogue(row block, column block)`, come after. `after` is what is read when all columns are done.
  template <typename Weights, typename Make>
  void product(const Element* left, const Weights& weights, index column, const Area& after, const Make& epilogue) {
    const index parts = least(ABREAST, blocks(weights.columns) - column), number = wave.rows.size();
    const bool ends = column + ABREAST >= blocks(weights.columns);
    for (index at = 0; at < weights.size; at += PIECE_K) {
      const index next = at + PIECE_K;
      for (index part = 0; part < parts; ++part)
        weights.pack(piece + part * PIECE_BLOCKS * TILE, column + part, at, least(PIECE_K, weights.size - at));
      multiply_piece(multiply, left, weights.size, at, parts,
                     next < weights.size ? weights.piece(column, next)
                     : ends              ? after
                                         : weights.piece(column + ABREAST, 0));
    }
    for (index b = 0; b < number; ++b)
      for (index part = 0; part < parts; ++part) {
        const auto rows = epilogue(b, column + part);
        for (index r = 0; r < rows.steps; ++r) rows.step(r, sums[b] + part);
      }
  }

 private:
  static constexpr index MOST_BLOCKS = 8;

  template <typename M>
  void multiply_piece(const M& multiply, const Element* left, index size, index at, index parts, const Area& soon) {
    const index number = wave.rows.size(), depth = blocks(size);
    const Element* const begin = left + (at + PIECE_K < size ? at / BLOCK + PIECE_BLOCKS : 0) * TILE;
    for (index b = 0; b < number; ++b) {
      Operands<Element> operands = {left + (b * depth + at / BLOCK) * TILE, piece, PIECE_BLOCKS * TILE, parts,
                                    least(PIECE_K, size - at)};
      operands.next_left = b + 1 < number ? operands.left + depth * TILE : begin;
      operands.next_right = operands.next_left;  // the piece is near already
      operands.begin = at ? sums[b][0] : nullptr;
      if constexpr (TURNED) multiply(operands, sums[b], wave.rows[b].count, [] {}, Ahead({soon, b, number}, 1));
    }
  }

  const Multiplier& multiply;
  const Wave& wave;
  alignas(64) Element piece[ABREAST * PIECE_BLOCKS * TILE];
  alignas(64) float sums[MOST_BLOCKS][ABREAST][TILE];
};

}  // namespace
