// Products of few rows with weights that are read where they lie, once and in order: for decoding, where a layer
// is as fast as its weights arrive. Nothing is packed but the rows.
#pragma once
#include "mlp_common.h"

namespace {

constexpr index STREAM_ROWS = 16;        // with more, products by vectors take longer than the weights
constexpr index STREAM_TILED_ROWS = 32;  // with more, so do those by tiles

// Asks for weights in the order in which a thread reads them, some way ahead of the reading. Line after line: memory
// then sees one stream, and sends more of it than is asked for.
class Asker {
 public:
  // What is read after all that was announced so far; what finds no place is not asked for.
  void announce(const Element* first, index count) {
    const char* begin = reinterpret_cast<const char*>(first);
    const Span span = {begin, begin + count * sizeof(Element)};
    if (at == end)
      at = span.begin, end = span.end;
    else if (known < PLACES)
      spans[(oldest + known++) % PLACES] = span;
  }

  // At each step of a product, with the bytes that it reads.
  void ask(index bytes) {
    if (at == end) return;
    for (index i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += bytes;
    if (at >= end) turn();
  }

  void lead(index bytes) {
    for (; bytes > 0 && at != end; bytes -= 512) ask(512);
  }

 private:
  struct Span {
    const char *begin, *end;
  };
  static constexpr index PLACES = 16;

  void turn() {
    at = end;
    if (!known) return;
    at = spans[oldest].begin, end = spans[oldest].end;
    oldest = (oldest + 1) % PLACES;
    --known;
  }

  const char *at = nullptr, *end = nullptr;
  Span spans[PLACES];
  index oldest = 0, known = 0;
};

struct Silent {
  void ask(index) {}
};

// sums[row][column] for COLUMNS columns, whose weights are `stride` apart, and ROWS rows.
template <index COLUMNS, index ROWS, typename Ask>
void dot_products(const Element* weights, index stride, const Element* const* rows, index size, float* sums, Ask& ask) {
  PieceSum sum[COLUMNS][ROWS];
  for (auto& column : sum)
    for (PieceSum& value : column) value = PieceSum{};
  for (index k = 0; k < size; k += PIECE) {
    Piece row[ROWS];
    for (index r = 0; r < ROWS; ++r) row[r] = load_piece(rows[r] + k, size - k);
    ask.ask(COLUMNS * PIECE * sizeof(Element));
    for (index i = 0; i < COLUMNS; ++i) {
      const Piece weight = load_piece(weights + i * stride + k, size - k);
      for (index r = 0; r < ROWS; ++r) sum[i][r] = dot(sum[i][r], weight, row[r]);
    }
  }
  for (index i = 0; i < COLUMNS; ++i)
    for (index r = 0; r < ROWS; ++r) sums[r * BLOCK + i] = reduce_add(sum[i][r]);
}

template <index COLUMNS, index ROWS, typename Ask>
void dot_block(const Element* weights, index stride, index columns, const Element* const* rows, index size,
               float* sums, Ask& ask) {
  index i = 0;
  for (; i + COLUMNS <= columns; i += COLUMNS)
    dot_products<COLUMNS, ROWS>(weights + i * stride, stride, rows, size, sums + i, ask);
  for (; i < columns; ++i) dot_products<1, ROWS>(weights + i * stride, stride, rows, size, sums + i, ask);
}

// At most 8 rows.
template <typename Ask>
void dots_of_rows(const Element* weights, index stride, index columns, const Element* const* rows, index count,
                  index size, float* sums, Ask& ask) {
  using Kernel = void (*)(const Element*, index, index, const Element* const*, index, float*, Ask&);
  constexpr auto& COLUMNS = STREAM_COLUMNS;
  constexpr Kernel KERNELS[] = {dot_block<COLUMNS[0], 1, Ask>, dot_block<COLUMNS[1], 2, Ask>,
                                dot_block<COLUMNS[2], 3, Ask>, dot_block<COLUMNS[3], 4, Ask>,
                                dot_block<COLUMNS[4], 5, Ask>, dot_block<COLUMNS[5], 6, Ask>,
                                dot_block<COLUMNS[6], 7, Ask>, dot_block<COLUMNS[7], 8, Ask>};
  KERNELS[count - 1](weights, stride, columns, rows, size, sums, ask);
}

// Products of an expert's few rows with its weights, 32 columns at a time. One thread's.
template <typename M>
class Stream {
 public:
  // `room` is where the rows are packed: as the right operand, or for packed weights as the left one.
  Stream(const M& multiply, Element* room, bool has_packed_weights)
      : multiply(multiply), room(room), has_packed_weights(has_packed_weights) {}

  static index most_rows(bool amx, bool has_packed_weights, index model, index hidden) {
    const bool is_tiled = M::HAS_TILES && amx && (has_packed_weights || (model % BLOCK == 0 && hidden % BLOCK == 0));
    return is_tiled ? STREAM_TILED_ROWS : STREAM_ROWS;
  }

  void take(const Rows& of, index number, index width) {
    rows = of, count = number, size = width;
    if constexpr (M::HAS_TILES) {
      if (has_packed_weights) return M::pack_few(room, rows.at, count, size);
      has_tiles = multiply.amx && count > 2 && size % BLOCK == 0;
      if (has_tiles) M::pack_turned(room, rows.at, count, size);
    }
  }

  // sums[row][column] of at most 32 columns; asks as it reads.
  void block(const Element* weights, index columns, float* sums, Asker& asker) const {
    if constexpr (M::HAS_TILES) {
      if (has_packed_weights) return multiply.stream_packed(room, weights, blocks(size), count, sums, asker);
      if (has_tiles && columns >= BLOCK) return M::stream(weights, size, room, size / BLOCK, count, sums, asker);
    }
    columns = least(BLOCK, columns);
    dots_of_rows(weights, size, columns, rows.at, least(8, count), size, sums, asker);
    Silent silent;
    for (index r = 8; r < count; r += 8)
      dots_of_rows(weights, size, columns, rows.at + r, least(8, count - r), size, sums + r * BLOCK, silent);
  }

 private:
  const M& multiply;
  Element* room;
  const bool has_packed_weights;
  Rows rows{nullptr, 0, 0};
  index count = 0, size = 0;
  bool has_tiles = false;
};

}  // namespace
