// Tiles and products in fp32, with AVX-512.
#pragma once
#include <array>
#include <utility>

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

constexpr index ABREAST = 2;    // right operands that are multiplied at once
constexpr bool TURNED = true;   // left operands may be read across: what is packed once serves both ways
constexpr bool EVEN = true;     // rows are blocks of equal height, as any number of rows or k is multiplied
constexpr index RUN = 2;        // k blocks whose right tiles stay in the first-level cache over all rows

// Some k blocks of a product, and whether the sums go on.
struct Run {
  const float *left, *right;
  index left_step, apart, k, height;
  bool adds;
};

// Half a tile that the next run reads, and the one in its next k block: asked for a line at a time.
struct NextHalf {
  const float* first;
  index step;
};

// sums += left x right for ROWS rows and one or two right operands: 24 sums in registers at most. There is one k at
// least, and no branch around the sums: compilers keep them in registers from the first load to the last store.
template <index ROWS, index PARTS, bool IS_TURNED>
void multiply_rows(const Run& run, index row, NextHalf next, Sums sums) {
  constexpr index VECTORS = 2 * PARTS, ROW = IS_TURNED ? 1 : BLOCK, K = IS_TURNED ? BLOCK : 1;
  const __mmask16 adds = run.adds ? 0xffff : 0;
  float* const at = sums[0] + row * BLOCK;
  Vector sum[ROWS][VECTORS];
  for (index r = 0; r < ROWS; ++r)
    for (index v = 0; v < VECTORS; ++v)
      sum[r][v] = _mm512_maskz_loadu_ps(adds, at + v / 2 * TILE + r * BLOCK + v % 2 * 16);
  const float *left = run.left + row * ROW, *right = run.right, *soon = next.first;
  index rest = run.k;
  do {
    const float *a_k = left, *b_k = right, *const end = right + least(rest, run.height) * BLOCK, *line = soon;
    do {
      __builtin_prefetch(line);
      Vector b[VECTORS];
      for (index v = 0; v < VECTORS; ++v) b[v] = _mm512_loadu_ps(b_k + v / 2 * run.apart + v % 2 * 16);
#pragma GCC unroll 8
      for (index r = 0; r < ROWS; ++r) {
        Vector a = _mm512_set1_ps(a_k[r * ROW]);
        __asm__("" : "+v"(a));  // once into a register, not into every product from memory
        for (index v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_fmadd_ps(a, b[v], sum[r][v]);
      }
      a_k += K, b_k += BLOCK, line += 16;
    } while (b_k < end);
    left += run.left_step, right += TILE, soon += next.step;
    rest -= run.height;
  } while (rest > 0);
  for (index r = 0; r < ROWS; ++r)
    for (index v = 0; v < VECTORS; ++v) _mm512_store_ps(at + v / 2 * TILE + r * BLOCK + v % 2 * 16, sum[r][v]);
}

using MultiplyRows = void (*)(const Run&, index, NextHalf, Sums);

template <index PARTS, bool IS_TURNED, index... ROWS>
constexpr std::array<MultiplyRows, sizeof...(ROWS)> multiply_table(std::integer_sequence<index, ROWS...>) {
  return {multiply_rows<ROWS + 1, PARTS, IS_TURNED>...};
}
using OneToEight = std::make_integer_sequence<index, 8>;
using OneToSix = std::make_integer_sequence<index, 6>;
constexpr std::array<MultiplyRows, 8> ONE[] = {multiply_table<1, false>(OneToEight()),
                                               multiply_table<1, true>(OneToEight())};
constexpr std::array<MultiplyRows, 6> TWO[] = {multiply_table<2, false>(OneToSix()),
                                               multiply_table<2, true>(OneToSix())};

struct Multiplier {
  static constexpr bool HAS_TILES = false;

  explicit Multiplier(index) {}

  // sums[part] = left x right[part] for the first `rows` rows; `work` is called once per part and k block.
  template <typename Work>
  void operator()(const Operands<float>& o, Sums sums, index rows, const Work& work) const {
    const MultiplyRows* kernels = o.parts == 1 ? ONE[o.turned].data() : TWO[o.turned].data();
    const index most = o.parts == 1 ? 8 : 6, steps = (rows + most - 1) / most, span = RUN * o.height;
    Run run = {o.left, o.right, o.left_step, o.apart, 0, o.height, false};
    for (index k = 0; k < o.k; k += span, run.adds = true) {
      run.k = least(span, o.k - k);
      const index works = (run.k + o.height - 1) / o.height * o.parts;
      const bool ends = k + span >= o.k;
      const float* next_left = ends ? o.next_left : run.left + RUN * run.left_step;
      const float* next_right = ends ? o.next_right : run.right + RUN * TILE;
      for (index step = 0, row = 0; step < steps; ++step) {
        const index count = (rows - row + steps - step - 1) / (steps - step), part = step / 2;
        const bool is_right = part < o.parts;
        NextHalf next = {is_right ? next_right + part * o.apart : next_left, is_right ? TILE : run.left_step};
        next.first += step % 2 * (TILE / 2);
        for (index i = works * step / steps; i < works * (step + 1) / steps; ++i) work();
        kernels[count - 1](run, row, next, sums);
        row += count;
      }
      run.left += RUN * run.left_step;
      run.right += RUN * TILE;
    }
  }
};

}  // namespace
