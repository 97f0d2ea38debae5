// Products of few rows with weights that are read where they lie, once and in order: for decoding, where a layer
// is as fast as its weights arrive. Nothing is packed but the rows.
#pragma once
#include "mlp_common.h"

namespace {

constexpr index STREAM_ROWS = 16;  // with more, the products take longer than the weights

// sums[row][column] for COLUMNS columns, whose weights are `stride` apart, and ROWS rows.
template <index COLUMNS, index ROWS>
void dot_products(const Element* weights, index stride, const Element* const* rows, index size, float* sums) {
  PieceSum sum[COLUMNS][ROWS];
  for (auto& column : sum)
    for (PieceSum& value : column) value = PieceSum{};
  for (index k = 0; k < size; k += PIECE) {
    Piece row[ROWS];
    for (index r = 0; r < ROWS; ++r) row[r] = load_piece(rows[r] + k, size - k);
    for (index i = 0; i < COLUMNS; ++i) {
      const Element* place = weights + i * stride + k;
      prefetch(place + COLUMNS * stride);
      const Piece weight = load_piece(place, size - k);
      for (index r = 0; r < ROWS; ++r) sum[i][r] = dot(sum[i][r], weight, row[r]);
    }
  }
  for (index i = 0; i < COLUMNS; ++i)
    for (index r = 0; r < ROWS; ++r) sums[r * BLOCK + i] = reduce_add(sum[i][r]);
}

template <index COLUMNS, index ROWS>
void dot_block(const Element* weights, index stride, index columns, const Element* const* rows, index size,
               float* sums) {
  index i = 0;
  for (; i + COLUMNS <= columns; i += COLUMNS)
    dot_products<COLUMNS, ROWS>(weights + i * stride, stride, rows, size, sums + i);
  for (; i < columns; ++i) dot_products<1, ROWS>(weights + i * stride, stride, rows, size, sums + i);
}

inline void stream_block_of_vectors(const Element* weights, index stride, index columns, const Element* const* rows,
                                    index count, index size, float* sums) {
  using Kernel = void (*)(const Element*, index, index, const Element* const*, index, float*);
  constexpr auto& COLUMNS = STREAM_COLUMNS;
  constexpr Kernel KERNELS[] = {dot_block<COLUMNS[0], 1>, dot_block<COLUMNS[1], 2>, dot_block<COLUMNS[2], 3>,
                                dot_block<COLUMNS[3], 4>, dot_block<COLUMNS[4], 5>, dot_block<COLUMNS[5], 6>,
                                dot_block<COLUMNS[6], 7>, dot_block<COLUMNS[7], 8>};
  for (index r = 0; r < count; r += 8)
    KERNELS[least(8, count - r) - 1](weights, stride, least(BLOCK, columns), rows + r, size, sums + r * BLOCK);
}

// Rows of a layer's input, and their products with its weights, 32 columns at a time.
template <typename M>
class Stream {
 public:
  // `packed` is room for the rows as an operand: the right one, or of packed weights the left one.
  Stream(const M& multiply, const Rows& rows, index count, index size, Element* packed, bool has_packed_weights)
      : multiply(multiply), rows(rows), count(count), size(size), packed(packed),
        has_packed_weights(has_packed_weights) {
    if constexpr (M::HAS_TILES) {
      if (has_packed_weights) {
        M::pack_few(packed, rows.at, count, size);
        return;
      }
      has_tiles = multiply.amx && count > 2 && size % BLOCK == 0;
      if (!has_tiles) return;
      for (index k = 0; k < size; k += BLOCK) pack_right_transposed(packed + k * BLOCK, rows.at, k, size - k);
    }
  }

  // sums[row][column] of at most 32 columns.
  void block(const Element* weights, index columns, float* sums) const {
    if constexpr (M::HAS_TILES) {
      if (has_packed_weights) return multiply.stream_packed(packed, weights, blocks(size), count, sums);
      if (has_tiles && columns >= BLOCK) return M::stream(weights, size, packed, size / BLOCK, sums);
    }
    stream_block_of_vectors(weights, size, columns, rows.at, count, size, sums);
  }

 private:
  const M& multiply;
  const Rows& rows;
  const index count, size;
  Element* packed;
  const bool has_packed_weights;
  bool has_tiles = false;
};

}  // namespace
