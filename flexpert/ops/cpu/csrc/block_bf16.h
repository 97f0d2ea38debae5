// Tiles and products in bf16 with fp32 sums: on AMX, or with the dot product of AVX-512.
//
// A left tile is [32 rows][32 k]; a right one [2 halves][16 pairs of k][16 columns][2 k], as both units read it.
#pragma once
#include "block.h"
#include "transpose.h"
#include "vector.h"

namespace {

using Element = uint16_t;

inline __m512i load_32(const Element* source, index count) {
  const __mmask32 lanes = count <= 0 ? 0 : count >= 32 ? 0xffffffffu : (1u << count) - 1;
  return _mm512_maskz_loadu_epi16(lanes, source);
}

using Piece = __m512i;
using PieceSum = Vector;
constexpr index PIECE = 32;

inline Piece load_piece(const Element* source, index count) {
  return count >= PIECE ? _mm512_loadu_si512(source) : load_32(source, count);
}

inline Vector dot(Vector sum, Piece a, Piece b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

inline __m256i narrow(Vector value) { return (__m256i)_mm512_cvtneps_pbh(value); }

inline void store_row(Element* target, Vector value, index count) {
  _mm256_mask_storeu_epi16(target, first_lanes(count), narrow(value));
}

// 32 numbers, and past the caches where the line is whole: `streams` says so for a whole target.
inline void store_32(Element* target, Vector low, Vector high, index count, bool streams = false) {
  const auto both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (count < 32)
    _mm512_mask_storeu_epi16(target, count <= 0 ? 0 : (1u << count) - 1, both);
  else if (streams)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), both);
  else
    _mm512_storeu_si512(target, both);
}

inline void pack_left(Element* tile, const Element* const* rows, index first, index width) {
  for (index r = 0; r < BLOCK; ++r)
    _mm512_storeu_si512(tile + r * BLOCK, rows[r] ? load_32(rows[r] + first, width) : _mm512_setzero_si512());
}

// out[half][i] = 16 columns, each with the elements of rows 2 i (low) and 2 i + 1 (high).
inline void pair_rows(__m512i (&out)[2][16], const Element* const* rows, index first, index width) {
  const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (index i = 0; i < 16; ++i) {
    const Element *even = rows[2 * i], *odd = rows[2 * i + 1];
    const __m512i a = even ? load_32(even + first, width) : _mm512_setzero_si512();
    const __m512i b = odd ? load_32(odd + first, width) : _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);  // in each 128 bits
    out[0][i] = _mm512_permutex2var_epi64(low, left, high);
    out[1][i] = _mm512_permutex2var_epi64(low, right, high);
  }
}

inline void store_halves(Element* tile, const __m512i (&halves)[2][16]) {
  for (index half = 0; half < 2; ++half)
    for (index i = 0; i < 16; ++i) _mm512_storeu_si512(tile + half * (TILE / 2) + i * BLOCK, halves[half][i]);
}

inline void pack_right(Element* tile, const Element* const* rows, index first, index width) {
  __m512i halves[2][16];
  pair_rows(halves, rows, first, width);
  store_halves(tile, halves);
}

inline void pack_left_transposed(Element* tile, const Element* const* rows, index first, index width) {
  __m512i halves[2][16];
  pair_rows(halves, rows, first, width);
  transpose(halves[0]);
  transpose(halves[1]);
  store_halves(tile, halves);
}

inline void pack_right_transposed(Element* tile, const Element* const* rows, index first, index width,
                                  index halves = 2) {
  for (index half = 0; half < halves; ++half) {
    __m512i square[16];
    for (index i = 0; i < 16; ++i) {
      const Element* source = rows[16 * half + i];
      square[i] = source ? load_32(source + first, width) : _mm512_setzero_si512();
    }
    transpose(square);
    for (index i = 0; i < 16; ++i) _mm512_storeu_si512(tile + half * (TILE / 2) + i * BLOCK, square[i]);
  }
}

constexpr index ABREAST = 1;  // right operands that are multiplied at once
constexpr bool TURNED = false, EVEN = false;

// Lives in each thread as long as it multiplies: AMX needs its tiles configured.
struct Multiplier {
  static constexpr bool HAS_TILES = true;
  static constexpr index FEW = 4;  // rows of packed weights that vectors multiply as fast as memory gives them
  bool amx;

  explicit Multiplier(index use_amx) : amx(use_amx != 0) {
    if (!amx) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // The intrinsic tells GCC of its first 8 bytes alone: without this it may leave out the others.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Multiplier() {
    if (amx) _tile_release();
  }
  Multiplier(const Multiplier&) = delete;

  // sums[part] = left x right[part] for the first `rows` rows at least. Other `work` is called once per part and k
  // block, to run on the units that the product leaves idle.
  template <typename Work>
  void operator()(const Operands<Element>& o, Sums sums, index rows, const Work& work) const {
    const index count = blocks(o.k);
    const Element *left = o.left, *right = o.right;
    for (index part = 0; part < o.parts; ++part, right += o.apart) {
      if (!amx) {
        for (index k = 0; k < count; ++k) work();
        for (index r = 0; r < rows; r += 8) dot_rows<8>(left + r * BLOCK, right, count, sums[part] + r * BLOCK, [] {});
      } else if (rows > 16) {
        tiles_32(left, right, count, sums[part], work, o.begin);
      } else {
        tiles_16(left, right, count, sums[part], work, o.begin);
      }
    }
  }

  // The right operands of `number` column blocks, `apart` from each other, from 32 rows of weights `stride` apart of which
  // there are `size`: a pair of rows at a time, along them, as a line of each of 32 rows may not fit the first-level cache.
  static void pack_rights(Element* tiles, index apart, const Element* weights, index stride, index size, index width,
                          index number) {
    constexpr index SOON = 6;  // rows
    const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (index i = 0; i < BLOCK / 2; ++i, weights += 2 * stride, size -= 2) {
      Element* target = tiles + i * BLOCK;
      for (index at = 0; at < number * BLOCK; at += BLOCK, target += apart) {
        for (index row = 0; row < 2; ++row) __builtin_prefetch(weights + (SOON + row) * stride + at);
        const __m512i a = size > 0 ? load_32(weights + at, width - at) : _mm512_setzero_si512();
        const __m512i b = size > 1 ? load_32(weights + stride + at, width - at) : _mm512_setzero_si512();
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
        _mm512_storeu_si512(target, _mm512_permutex2var_epi64(low, left, high));
        _mm512_storeu_si512(target + TILE / 2, _mm512_permutex2var_epi64(low, right, high));
      }
    }
  }

  // At most 32 rows as the left operand of `stream_packed`: rows past `count` are zero, others are not touched.
  static void pack_few(Element* tiles, const Element* const* rows, index count, index size) {
    const index height = count > 16 ? 32 : count > FEW ? 16 : count;
    for (index k = 0; k < size; k += BLOCK, tiles += TILE)
      for (index r = 0; r < height; ++r)
        _mm512_storeu_si512(tiles + r * BLOCK, r < count ? load_32(rows[r] + k, size - k) : _mm512_setzero_si512());
  }

  // sums[row][column] of one packed right operand and `rows` rows from `pack_few`.
  template <typename Ask>
  void stream_packed(const Element* left, const Element* right, index count, index rows, float* sums,
                     Ask& asker) const {
    const auto ask = [&asker] { asker.ask(TILE * sizeof(Element)); };
    if (amx && rows > 16) return tiles_32(left, right, count, sums, ask, nullptr);
    if (amx && rows > FEW) return tiles_16(left, right, count, sums, ask);
    few_rows(left, right, count, least(4, rows), sums, ask);
    for (index r = 4; r < rows; r += 4)
      few_rows(left + r * BLOCK, right, count, least(4, rows - r), sums + r * BLOCK, [] {});
  }

  // At most 32 rows as the right operand of `stream`.
  static void pack_turned(Element* tiles, const Element* const* rows, index count, index size) {
    for (index k = 0; k < size; k += BLOCK) pack_right_transposed(tiles + k * BLOCK, rows, k, size - k, count > 16 ? 2 : 1);
  }

  // sums[row][column] of 32 columns, whose weights lie `stride` apart and are read there, and `rows` rows from
  // `pack_turned`: the weights are the left operand.
  template <typename Ask>
  static void stream(const Element* weights, index stride, const Element* right, index count, index rows, float* sums,
                     Ask& asker) {
    alignas(64) float turned[TILE];
    if (rows > 16)
      stream_32(weights, stride, right, count, turned, asker);
    else
      stream_16(weights, stride, right, count, turned, asker);
    turn(turned, sums);
    if (rows > 16) turn(turned + TILE / 2, sums + TILE / 2);
  }

 private:
  static void turn(const float* turned, float* sums) {
    for (index half = 0; half < 2; ++half) {
      __m512i square[16];
      for (index i = 0; i < 16; ++i) square[i] = _mm512_load_si512(turned + (half * 16 + i) * 16);
      transpose(square);
      for (index r = 0; r < 16; ++r) _mm512_store_si512(sums + r * BLOCK + half * 16, square[r]);
    }
  }

  template <typename Ask>
  static void stream_16(const Element* weights, index stride, const Element* right, index count, float* turned,
                        Ask& asker) {
    _tile_zero(0);
    _tile_zero(2);
    for (index k = 0; k < count; ++k, weights += BLOCK, right += TILE) {
      asker.ask(TILE * sizeof(Element));
      _tile_loadd(6, right, 64);
      _tile_loadd(4, weights, stride * sizeof(Element));
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, weights + 16 * stride, stride * sizeof(Element));
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, turned, 64);
    _tile_stored(2, turned + TILE / 4, 64);
  }

  template <typename Ask>
  static void stream_32(const Element* weights, index stride, const Element* right, index count, float* turned,
                        Ask& asker) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (index k = 0; k < count; ++k, weights += BLOCK, right += TILE) {
      asker.ask(TILE * sizeof(Element));
      _tile_loadd(6, right, 64);
      _tile_loadd(4, weights, stride * sizeof(Element));
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, weights + 16 * stride, stride * sizeof(Element));
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, right + TILE / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, turned, 64);
    _tile_stored(2, turned + TILE / 4, 64);
    _tile_stored(1, turned + TILE / 2, 64);
    _tile_stored(3, turned + TILE * 3 / 4, 64);
  }

  // The left operand is used again with the next right one: those are loaded past the first-level cache, so that it
  // stays there.
  template <typename Work>
  static void tiles_32(const Element* left, const Element* right, index count, float* sums, const Work& work,
                       const float* begin) {
    if (begin) {
      _tile_loadd(0, begin, 128);
      _tile_loadd(1, begin + 16, 128);
      _tile_loadd(2, begin + TILE / 2, 128);
      _tile_loadd(3, begin + TILE / 2 + 16, 128);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (index k = 0; k < count; ++k, left += TILE, right += TILE) {
      _tile_loadd(4, left, 64);
      _tile_stream_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stream_loadd(7, right + TILE / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, left + TILE / 2, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      work();
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + TILE / 2, 128);
    _tile_stored(3, sums + TILE / 2 + 16, 128);
  }

  template <typename Work>
  static void tiles_16(const Element* left, const Element* right, index count, float* sums, const Work& work,
                       const float* begin = nullptr) {
    if (begin) {
      _tile_loadd(0, begin, 128);
      _tile_loadd(1, begin + 16, 128);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (index k = 0; k < count; ++k, left += TILE, right += TILE) {
      _tile_loadd(4, left, 64);
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + TILE / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      work();
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
  }

  // At most 4 rows.
  template <typename Work>
  static void few_rows(const Element* left, const Element* right, index count, index rows, float* sums,
                       const Work& work) {
    using Kernel = void (*)(const Element*, const Element*, index, float*, const Work&);
    constexpr Kernel KERNELS[] = {dot_rows<1, Work>, dot_rows<2, Work>, dot_rows<3, Work>, dot_rows<4, Work>};
    KERNELS[rows - 1](left, right, count, sums, work);
  }

  template <int ROWS, typename Work>
  static void dot_rows(const Element* left, const Element* right, index count, float* sums, const Work& work) {
    Vector sum[ROWS][2];
    for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
    for (index tile = 0; tile < count; ++tile, left += TILE, right += TILE) {
      work();
      for (int pair = 0; pair < 16; ++pair) {
        const auto b0 = (__m512bh)_mm512_loadu_si512(right + pair * BLOCK);
        const auto b1 = (__m512bh)_mm512_loadu_si512(right + TILE / 2 + pair * BLOCK);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          int two;
          __builtin_memcpy(&two, left + r * BLOCK + 2 * pair, 4);
          const auto a = (__m512bh)_mm512_set1_epi32(two);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, b0);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], a, b1);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < 2; ++c) _mm512_storeu_ps(sums + r * BLOCK + c * 16, sum[r][c]);
  }
};

}  // namespace
