// The vocabulary of the kernels with AVX2 and FMA: two halves of 8 floats, so that the algorithms stay those of 16.
// The words are explained in vector_avx512.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "block.h"

namespace {

struct Vector {
  __m256 low, high;
};
struct Integers {
  __m256i low, high;
};
struct Mask {  // lanes of all ones or all zeros
  __m256 low, high;
};

inline Vector constant(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Integers constant_integers(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }

// The first `count` of 8 lanes, which may be none, all or more, as masked instructions take them.
inline __m256i first_of_8(index count) {
  alignas(64) static const int32_t ONES_AND_ZEROS[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(ONES_AND_ZEROS + 8 - (count < 0 ? 0 : least(count, 8))));
}
inline Mask first_lanes(index count) {
  return {_mm256_castsi256_ps(first_of_8(count)), _mm256_castsi256_ps(first_of_8(count - 8))};
}

// Memory -------------------------------------------------------------------------------------------------------

inline Vector load(const float* from) { return {_mm256_load_ps(from), _mm256_load_ps(from + 8)}; }
inline Integers load(const int32_t* from) {
  const auto* halves = reinterpret_cast<const __m256i*>(from);
  return {_mm256_load_si256(halves), _mm256_load_si256(halves + 1)};
}
inline void store(float* to, Vector value) {
  _mm256_store_ps(to, value.low);
  _mm256_store_ps(to + 8, value.high);
}
inline void store(int32_t* to, Integers value) {
  auto* halves = reinterpret_cast<__m256i*>(to);
  _mm256_store_si256(halves, value.low);
  _mm256_store_si256(halves + 1, value.high);
}

inline Vector load_row(const float* source, index count) {
  if (count >= 16) return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)};
  return {_mm256_maskload_ps(source, first_of_8(count)), _mm256_maskload_ps(source + 8, first_of_8(count - 8))};
}
inline void store_row(float* to, Vector value, index count) {
  if (count >= 16) {
    _mm256_storeu_ps(to, value.low);
    _mm256_storeu_ps(to + 8, value.high);
  } else {
    _mm256_maskstore_ps(to, first_of_8(count), value.low);
    _mm256_maskstore_ps(to + 8, first_of_8(count - 8), value.high);
  }
}

// 16 numbers of 16 bits, of which `count` are in memory and the others 0: no instruction masks these.
inline __m256i load_16(const uint16_t* source, index count) {
  if (count >= 16) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  alignas(32) uint16_t numbers[16] = {};
  if (count > 0) std::memcpy(numbers, source, count * sizeof(uint16_t));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers));
}
inline void store_16(uint16_t* to, __m256i value, index count) {
  if (count >= 16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
  alignas(32) uint16_t numbers[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(numbers), value);
  if (count > 0) std::memcpy(to, numbers, count * sizeof(uint16_t));
}

inline __m256 widen(__m128i value) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(value), 16));
}
inline Vector load_row(const uint16_t* source, index count) {
  const __m256i value = load_16(source, count);
  return {widen(_mm256_castsi256_si128(value)), widen(_mm256_extracti128_si256(value, 1))};
}

template <typename T>
inline Vector load(const T* from, index left) {
  return load_row(from, left);
}
inline void store(float* to, Vector value, index left) { store_row(to, value, left); }

// In the low half of each 32 bits. A NaN stays one: rounding might carry it to infinity, or past it to zero.
inline __m256i narrow(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), upper = _mm256_srli_epi32(bits, 16);
  const __m256i half = _mm256_add_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i number = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(number, nan, _mm256_castps_si256(is_nan));
}

inline __m256i narrow(Vector value) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow(value.low), narrow(value.high)), 0xd8);
}

inline void store(uint16_t* to, Vector value, index left) { store_16(to, narrow(value), left); }

// Arithmetic ---------------------------------------------------------------------------------------------------

inline Vector add(Vector a, Vector b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vector sub(Vector a, Vector b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vector mul(Vector a, Vector b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vector divide(Vector a, Vector b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vector fmadd(Vector a, Vector b, Vector c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vector fnmadd(Vector a, Vector b, Vector c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Vector square_root(Vector x) { return {_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)}; }

inline Vector minimum(Vector a, Vector b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Vector maximum(Vector a, Vector b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Integers maximum(Integers a, Integers b) {
  return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
}

inline Vector bits_and(Vector a, Vector b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
inline Vector bits_or(Vector a, Vector b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline Integers bits_of(Vector x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Vector magnitude(Vector x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}

inline Vector nearest_integer(Vector x) { return {_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }

// A power of two by its exponent; of a NaN 2^0, as its integer is -2^31.
inline __m256 power_of_two(__m256 power) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Vector scale(Vector x, Vector power) { return mul(x, {power_of_two(power.low), power_of_two(power.high)}); }

// The estimate of AVX has 11 bits, too few even for bf16.
template <bool EXACT>
inline Vector inverse(Vector x) {
  return divide(constant(1.0f), x);
}

inline __m128 fold(__m256 x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
inline float reduce_add(__m256 x) {
  const __m128 four = fold(x), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_add(Vector x) { return reduce_add(_mm256_add_ps(x.low, x.high)); }
inline float reduce_max(Vector x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t reduce_max(Integers x) {
  const __m256i eight = _mm256_max_epi32(x.low, x.high);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// Choice -------------------------------------------------------------------------------------------------------

template <int HOW>
inline Mask compare(Vector a, Vector b) {
  return {_mm256_cmp_ps(a.low, b.low, HOW), _mm256_cmp_ps(a.high, b.high, HOW)};
}
inline Mask greater(Vector a, Vector b) { return compare<_CMP_GT_OQ>(a, b); }
inline Mask less(Vector a, Vector b) { return compare<_CMP_LT_OQ>(a, b); }
inline Mask not_at_most(Vector a, Vector b) { return compare<_CMP_NLE_UQ>(a, b); }
inline Mask is_nan(Vector x) { return compare<_CMP_UNORD_Q>(x, x); }

inline uint32_t lanes_in(Mask mask) { return _mm256_movemask_ps(mask.low) | _mm256_movemask_ps(mask.high) << 8; }
inline bool any(Mask mask) { return lanes_in(mask); }

inline Vector select(Mask mask, Vector yes, Vector no) {
  return {_mm256_blendv_ps(no.low, yes.low, mask.low), _mm256_blendv_ps(no.high, yes.high, mask.high)};
}
inline Integers select(Mask mask, Integers yes, Integers no) {
  return {_mm256_blendv_epi8(no.low, yes.low, _mm256_castps_si256(mask.low)),
          _mm256_blendv_epi8(no.high, yes.high, _mm256_castps_si256(mask.high))};
}
inline Vector zero_where(Mask mask, Vector x) {
  return {_mm256_andnot_ps(mask.low, x.low), _mm256_andnot_ps(mask.high, x.high)};
}

inline Vector keep_first(Vector x, index left) {
  const Mask mask = first_lanes(left);
  return {_mm256_and_ps(mask.low, x.low), _mm256_and_ps(mask.high, x.high)};
}
inline Integers keep_first(Integers x, index left, Integers others) { return select(first_lanes(left), x, others); }
inline Vector add_first(Vector sum, Vector x, index left) { return add(sum, keep_first(x, left)); }
inline Vector load(const float* from, index left, float other) {
  return select(first_lanes(left), load_row(from, left), constant(other));
}

inline uint32_t equal_lanes(Integers a, Integers b) {
  return lanes_in({_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.low, b.low)),
                   _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.high, b.high))});
}
inline Mask lanes_of_bits(uint32_t lanes) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i low = _mm256_set1_epi32(lanes), high = _mm256_set1_epi32(lanes >> 8);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(low, bit), bit)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(high, bit), bit))};
}
inline Integers replace_lanes(Integers x, uint32_t lanes, Integers others) {
  return select(lanes_of_bits(lanes), others, x);
}

inline __m256i ordered(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), flip = _mm256_srai_epi32(bits, 31);
  return _mm256_xor_si256(bits, _mm256_and_si256(flip, _mm256_set1_epi32(0x7fffffff)));
}
inline Integers ordered(Vector x) { return {ordered(x.low), ordered(x.high)}; }

constexpr index STREAM_COLUMNS[] = {4, 4, 4, 2, 2, 2, 1, 1};
constexpr int LOGITS_OF_ONE = 4, LOGITS_SIDE = 2;

}  // namespace
