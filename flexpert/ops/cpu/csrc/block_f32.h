// Tiles and products in fp32, with AVX-512.
#pragma once
#include <array>
#include <cstddef>
#include <type_traits>
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

// 16 numbers of each of 16 rows, from `first` on, to 16 columns. Four numbers at a time come from memory to where they
// are needed, which leaves half of the shuffles of a transpose in registers: there is one port for these.
inline void turn_square(float* target, const float* const* rows, index first) {
  Vector part[4][4];  // [i][column / 4]: of rows i, 4 + i, 8 + i and 12 + i
#pragma GCC unroll 4
  for (index i = 0; i < 4; ++i) {
    const float *a = rows[i] + first, *b = rows[4 + i] + first, *c = rows[8 + i] + first, *d = rows[12 + i] + first;
#pragma GCC unroll 4
    for (index j = 0; j < 4; ++j) {
      Vector four = _mm512_broadcast_f32x4(_mm_loadu_ps(a + 4 * j));
      four = _mm512_mask_broadcast_f32x4(four, 0x00f0, _mm_loadu_ps(b + 4 * j));
      four = _mm512_mask_broadcast_f32x4(four, 0x0f00, _mm_loadu_ps(c + 4 * j));
      part[i][j] = _mm512_mask_broadcast_f32x4(four, 0xf000, _mm_loadu_ps(d + 4 * j));
    }
  }
#pragma GCC unroll 4
  for (index j = 0; j < 4; ++j, target += 4 * BLOCK) {
    const auto low = [](Vector x, Vector y) { return _mm512_castps_pd(_mm512_unpacklo_ps(x, y)); };
    const auto high = [](Vector x, Vector y) { return _mm512_castps_pd(_mm512_unpackhi_ps(x, y)); };
    const __m512d low_01 = low(part[0][j], part[1][j]), low_23 = low(part[2][j], part[3][j]);
    const __m512d high_01 = high(part[0][j], part[1][j]), high_23 = high(part[2][j], part[3][j]);
    _mm512_storeu_pd(target, _mm512_unpacklo_pd(low_01, low_23));
    _mm512_storeu_pd(target + BLOCK, _mm512_unpackhi_pd(low_01, low_23));
    _mm512_storeu_pd(target + 2 * BLOCK, _mm512_unpacklo_pd(high_01, high_23));
    _mm512_storeu_pd(target + 3 * BLOCK, _mm512_unpackhi_pd(high_01, high_23));
  }
}

// Rows become columns: a left operand from its k, or a right one from its columns.
inline void pack_left_transposed(float* tile, const float* const* rows, index first, index width) {
  if (width >= BLOCK && rows[BLOCK - 1]) {  // whole
    for (index row = 0; row < 32; row += 16)
      for (index column = 0; column < 32; column += 16)
        turn_square(tile + column * BLOCK + row, rows + row, first + column);
    return;
  }
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

// Some k blocks of a product, and the sums that they are added to; null for zero.
struct Run {
  const float *left, *right;
  index left_step, apart, k, height;
  const float* begin;
};

// What is asked for at each k of a step: a line of half a tile that the next run reads, and of the one in its next k
// block. Where it ASKS, for each k block a stretch of memory that is read later, too.
struct Soon {
  const float* half;
  index half_step;
  Stretch far[RUN];
};

// sums += left x right for ROWS rows and one or two right operands: 24 sums in registers at most. There is one k at
// least, and no branch around the sums: compilers keep them in registers from the first load to the last store.
template <index ROWS, index PARTS, bool IS_TURNED, bool ASKS>
void multiply_rows(const Run& run, index row, const Soon& next, Sums sums) {
  constexpr index VECTORS = 2 * PARTS, ROW = IS_TURNED ? 1 : BLOCK, K = IS_TURNED ? BLOCK : 1;
  const __mmask16 adds = run.begin ? 0xffff : 0;
  float* const at = sums[0] + row * BLOCK;
  const float* const begin = (run.begin ? run.begin : sums[0]) + row * BLOCK;
  Vector sum[ROWS][VECTORS];
  for (index r = 0; r < ROWS; ++r)
    for (index v = 0; v < VECTORS; ++v)
      sum[r][v] = _mm512_maskz_loadu_ps(adds, begin + v / 2 * TILE + r * BLOCK + v % 2 * 16);
  const float *left = run.left + row * ROW, *right = run.right, *half = next.half;
  [[maybe_unused]] const Stretch* stretch = next.far;
  index rest = run.k;
  do {
    const float *a_k = left, *b_k = right, *const end = right + least(rest, run.height) * BLOCK, *line = half;
    [[maybe_unused]] Stretch far = {};
    if constexpr (ASKS) far = *stretch++;
    do {
      __builtin_prefetch(line);
      if constexpr (ASKS) {
        __builtin_prefetch(far.first, 0, 2);
        __builtin_prefetch(far.first + far.twin, 0, 2);
        far.first += far.step;
      }
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
    left += run.left_step, right += TILE, half += next.half_step;
    rest -= run.height;
  } while (rest > 0);
  for (index r = 0; r < ROWS; ++r)
    for (index v = 0; v < VECTORS; ++v) _mm512_store_ps(at + v / 2 * TILE + r * BLOCK + v % 2 * 16, sum[r][v]);
}

using MultiplyRows = void (*)(const Run&, index, const Soon&, Sums);

template <index PARTS, bool IS_TURNED, bool ASKS, index... ROWS>
constexpr std::array<MultiplyRows, sizeof...(ROWS)> multiply_table(std::integer_sequence<index, ROWS...>) {
  return {multiply_rows<ROWS + 1, PARTS, IS_TURNED, ASKS>...};
}
using OneToEight = std::make_integer_sequence<index, 8>;
using OneToSix = std::make_integer_sequence<index, 6>;
constexpr std::array<MultiplyRows, 8> ONE[] = {multiply_table<1, false, false>(OneToEight()),
                                               multiply_table<1, true, false>(OneToEight()),
                                               multiply_table<1, false, true>(OneToEight())};
constexpr std::array<MultiplyRows, 6> TWO[] = {multiply_table<2, false, false>(OneToSix()),
                                               multiply_table<2, true, false>(OneToSix()),
                                               multiply_table<2, false, true>(OneToSix())};
enum Loop : index { BY_ROWS, ACROSS, BY_ROWS_AND_ASKING };

struct Multiplier {
  static constexpr bool HAS_TILES = false;

  explicit Multiplier(index) {}

  // sums[part] = left x right[part] for the first `rows` rows; `work` is called once per part and k block. With a left
  // operand that is not turned, memory may be asked for all the time (`Ahead`).
  template <typename Work, typename Asked = std::nullptr_t>
  void operator()(const Operands<float>& o, Sums sums, index rows, const Work& work, Asked ahead = {}) const {
    constexpr bool ASKS = !std::is_same_v<Asked, std::nullptr_t>;
    const Loop loop = ASKS ? BY_ROWS_AND_ASKING : o.turned ? ACROSS : BY_ROWS;
    const MultiplyRows* kernels = o.parts == 1 ? ONE[loop].data() : TWO[loop].data();
    const index most = o.parts == 1 ? 8 : 6, steps = (rows + most - 1) / most, span = RUN * o.height;
    Run run = {o.left, o.right, o.left_step, o.apart, 0, o.height, o.begin};
    if constexpr (ASKS) ahead.cut(steps * ((o.k + o.height - 1) / o.height));
    for (index k = 0; k < o.k; k += span, run.begin = sums[0]) {
      run.k = least(span, o.k - k);
      const index k_blocks = (run.k + o.height - 1) / o.height, works = k_blocks * o.parts;
      const bool ends = k + span >= o.k;
      const float* next_left = ends ? o.next_left : run.left + RUN * run.left_step;
      const float* next_right = ends ? o.next_right : run.right + RUN * TILE;
      for (index step = 0, row = 0; step < steps; ++step) {
        const index count = (rows - row + steps - step - 1) / (steps - step), part = step / 2;
        const bool is_right = part < o.parts;
        Soon next = {is_right ? next_right + part * o.apart : next_left, is_right ? TILE : run.left_step, {}};
        next.half += step % 2 * (TILE / 2);
        if constexpr (ASKS)
          for (index i = 0; i < k_blocks; ++i) next.far[i] = ahead.take(o.height, run.left);
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
