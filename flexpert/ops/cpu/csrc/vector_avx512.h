// The vocabulary of the kernels with AVX-512 F, BW, DQ, VL: each word is one instruction, or a few.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "block.h"

namespace {

using Vector = __m512;     // 16 floats
using Integers = __m512i;  // 16 signed integers of 32 bits
using Mask = __mmask16;    // what a comparison of Vectors says

inline Vector constant(float value) { return _mm512_set1_ps(value); }
inline Integers constant_integers(int32_t value) { return _mm512_set1_epi32(value); }

// The first `count` lanes, which may be none, all or more; of `left` lanes there is one at least.
inline __mmask16 first_lanes(index count) {
  return count <= 0 ? 0 : count >= 16 ? 0xffff : (1u << count) - 1;
}
inline __mmask16 lanes_of(index left) { return left >= 16 ? 0xffff : (1u << left) - 1; }

// Memory -------------------------------------------------------------------------------------------------------

// Whole and aligned.
inline Vector load(const float* from) { return _mm512_load_ps(from); }
inline Integers load(const int32_t* from) { return _mm512_load_si512(from); }
inline void store(float* to, Vector value) { _mm512_store_ps(to, value); }
inline void store(int32_t* to, Integers value) { _mm512_store_si512(to, value); }

// The first lanes; of the others no memory is touched, and they are 0 or `other`. Numbers of 16 bits are bf16.
inline Vector widen(__m256i value) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
}
inline Vector load_first(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline Vector load_first(const uint16_t* from, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, from));
}
template <typename T>
inline Vector load(const T* from, index left) {
  return load_first(from, lanes_of(left));
}
inline Vector load(const float* from, index left, float other) {
  return _mm512_mask_loadu_ps(constant(other), lanes_of(left), from);
}
template <typename T>
inline Vector load_row(const T* source, index count) {
  return load_first(source, first_lanes(count));
}
inline void store(float* to, Vector value, index left) { _mm512_mask_storeu_ps(to, lanes_of(left), value); }
// To the nearest, of two the even one, where no instruction does. A NaN stays one: rounding might carry it away.
inline void store(uint16_t* to, Vector value, index left) {
  const __m512i bits = _mm512_castps_si512(value), upper = _mm512_srli_epi32(bits, 16);
  const __m512i half = _mm512_add_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i number = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(number, is_nan, upper, _mm512_set1_epi32(0x40));
  _mm256_mask_storeu_epi16(to, lanes_of(left), _mm512_cvtepi32_epi16(result));
}
inline void store_row(float* to, Vector value, index count) { _mm512_mask_storeu_ps(to, first_lanes(count), value); }

// Arithmetic ---------------------------------------------------------------------------------------------------

inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
inline Vector fmadd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline Vector fnmadd(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Vector square_root(Vector x) { return _mm512_sqrt_ps(x); }

// Where one is a NaN, the second one.
inline Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Integers maximum(Integers a, Integers b) { return _mm512_max_epi32(a, b); }

inline Vector magnitude(Vector x) { return _mm512_abs_ps(x); }
inline Vector bits_and(Vector a, Vector b) { return _mm512_and_ps(a, b); }
inline Vector bits_or(Vector a, Vector b) { return _mm512_or_ps(a, b); }
inline Integers bits_of(Vector x) { return _mm512_castps_si512(x); }

inline Vector nearest_integer(Vector x) { return _mm512_roundscale_ps(x, 8); }

// x 2^power, for a whole power from -126 to 127; a NaN stays one.
inline Vector scale(Vector x, Vector power) { return _mm512_scalef_ps(x, power); }

// 1 / x for finite x: an estimate of 14 bits and, where EXACT, one step of Newton's method.
template <bool EXACT>
inline Vector inverse(Vector x) {
  const Vector guess = _mm512_rcp14_ps(x);
  if (!EXACT) return guess;
  return mul(guess, fnmadd(x, guess, constant(2.0f)));
}

// sum + the first lanes of x.
inline Vector add_first(Vector sum, Vector x, index left) {
  return _mm512_mask_add_ps(sum, lanes_of(left), sum, x);
}
inline float reduce_add(Vector x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Vector x) { return _mm512_reduce_max_ps(x); }
inline int32_t reduce_max(Integers x) { return _mm512_reduce_max_epi32(x); }

// Choice -------------------------------------------------------------------------------------------------------

// False for a NaN.
inline Mask greater(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask less(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
// True for one.
inline Mask not_at_most(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline Mask is_nan(Vector x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline bool any(Mask mask) { return mask; }

inline Vector select(Mask mask, Vector yes, Vector no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline Integers select(Mask mask, Integers yes, Integers no) { return _mm512_mask_mov_epi32(no, mask, yes); }
inline Vector zero_where(Mask mask, Vector x) { return _mm512_maskz_mov_ps(_knot_mask16(mask), x); }

// The first lanes of x, others in the rest.
inline Vector keep_first(Vector x, index left) { return _mm512_maskz_mov_ps(lanes_of(left), x); }
inline Integers keep_first(Integers x, index left, Integers others) {
  return _mm512_mask_mov_epi32(others, lanes_of(left), x);
}

// Lanes as bits, the first one lowest.
inline uint32_t equal_lanes(Integers a, Integers b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Integers replace_lanes(Integers x, uint32_t lanes, Integers others) {
  return _mm512_mask_mov_epi32(x, lanes, others);
}

// Floats as integers of the same order.
inline Integers ordered(Vector x) {
  const Integers bits = bits_of(x), flip = _mm512_srai_epi32(bits, 31);
  return _mm512_xor_si512(bits, _mm512_and_si512(flip, _mm512_set1_epi32(0x7fffffff)));
}

// How many sums stay in registers: columns of weights that are met where they lie, by the number of rows (1 to 8)
// that meet them; logits of one token, and tokens and experts of a square of them.
constexpr index STREAM_COLUMNS[] = {4, 4, 4, 4, 4, 4, 2, 2};
constexpr int LOGITS_OF_ONE = 8, LOGITS_SIDE = 4;

}  // namespace
