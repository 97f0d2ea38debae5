// Gate scores of one token and what follows from them: the best experts, and the gradient of the logits.
#pragma once
#include <cmath>
#include <limits>

#include "activations.h"
#include "block.h"

namespace {

constexpr index LANES = 16;

// The order of `SCORINGS` in route.py.
enum Scoring : index { SOFTMAX, SIGMOID_SCORE, SQRT_SOFTPLUS };

inline index padded(index size) { return (size + LANES - 1) / LANES * LANES; }
inline __mmask16 lanes_of(index left) { return left >= LANES ? 0xffff : (1u << left) - 1; }
inline Vector load(const float* from, index left, float other = 0.0f) {
  return _mm512_mask_loadu_ps(constant(other), lanes_of(left), from);
}
inline void store(float* to, Vector value, index left) { _mm512_mask_storeu_ps(to, lanes_of(left), value); }

// exp(x) for x <= 0; 0 below exp(-86.6) = 2.4e-38, as numbers that are not normal are slow. NaN stays NaN.
inline Vector decay(Vector x) {
  static const float series[] = {0.00139485808f, 0.00837512889f, 0.0416662183f, 0.166664155f,
                                 0.500000011f,   1.00000004f,    1.0f};
  const __mmask16 vanishes = _mm512_cmp_ps_mask(x, constant(-86.6f), _CMP_LT_OQ);
  x = _mm512_max_ps(constant(-86.6f), x);
  const Vector power = _mm512_roundscale_ps(_mm512_mul_ps(x, constant(1.44269504f)), 8);
  Vector rest = _mm512_fnmadd_ps(power, constant(0.693145752f), x);
  rest = _mm512_fnmadd_ps(power, constant(1.42860677e-6f), rest);
  return _mm512_maskz_scalef_ps(_knot_mask16(vanishes), polynomial(rest, series), power);
}

// log(1 + u) = 2 artanh(u / (2 + u)) for 0 <= u <= 1, relative to its size.
inline Vector log_of_one_plus(Vector u) {
  static const float series[] = {2.0f / 15, 2.0f / 13, 2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f};
  const Vector s = _mm512_div_ps(u, _mm512_add_ps(u, constant(2.0f)));
  return _mm512_mul_ps(s, polynomial(_mm512_mul_ps(s, s), series));
}

// 1 - exp(-s) for s >= 0, relative to its size.
inline Vector rise(Vector s) {
  static const float series[] = {-1.0f / 720, 1.0f / 120, -1.0f / 24, 1.0f / 6, -0.5f, 1.0f};
  const Vector far = _mm512_sub_ps(constant(1.0f), decay(_mm512_sub_ps(constant(0.0f), s)));
  const Vector near = _mm512_mul_ps(s, polynomial(s, series));
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(s, constant(0.25f), _CMP_LT_OQ), far, near);
}

inline Vector score_of(Scoring scoring, Vector z) {
  const Vector one = constant(1.0f), e = decay(_mm512_sub_ps(constant(0.0f), _mm512_abs_ps(z)));
  if (scoring == SIGMOID_SCORE) {
    const __mmask16 is_negative = _mm512_cmp_ps_mask(z, constant(0.0f), _CMP_LT_OQ);
    return _mm512_div_ps(_mm512_mask_blend_ps(is_negative, one, e), _mm512_add_ps(one, e));
  }
  const Vector softplus = _mm512_add_ps(_mm512_max_ps(constant(0.0f), z), log_of_one_plus(e));
  return _mm512_sqrt_ps(_mm512_max_ps(constant(std::numeric_limits<float>::min()), softplus));
}

// The scores of one token, in a row padded to whole vectors: what was stored in part is slow to load as a whole.
inline void softmax(const float* z, float* row, index size) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Vector most = constant(lowest), sum = constant(0.0f);
  for (index i = 0; i < size; i += LANES) most = _mm512_max_ps(load(z + i, size - i, lowest), most);
  const Vector peak = constant(_mm512_reduce_max_ps(most));
  for (index i = 0; i < size; i += LANES) {
    const Vector e = decay(_mm512_sub_ps(load(z + i, size - i, lowest), peak));
    _mm512_store_ps(row + i, e);
    sum = _mm512_mask_add_ps(sum, lanes_of(size - i), sum, e);
  }
  const Vector share = constant(1.0f / _mm512_reduce_add_ps(sum));
  for (index i = 0; i < size; i += LANES) _mm512_store_ps(row + i, _mm512_mul_ps(_mm512_load_ps(row + i), share));
}

inline void scores(Scoring scoring, const float* z, float* row, index size) {
  if (scoring == SOFTMAX) return softmax(z, row, size);
  for (index i = 0; i < size; i += LANES) _mm512_store_ps(row + i, score_of(scoring, load(z + i, size - i)));
}

// The gradient of the logits from that of the scores, in place.
inline void scores_backward(Scoring scoring, const float* score, float* grad, index size) {
  Vector mean = constant(0.0f);
  if (scoring == SOFTMAX) {
    for (index i = 0; i < size; i += LANES)
      mean = _mm512_fmadd_ps(load(score + i, size - i), load(grad + i, size - i), mean);
    mean = constant(_mm512_reduce_add_ps(mean));
  }
  for (index i = 0; i < size; i += LANES) {
    const Vector p = load(score + i, size - i, 1.0f), d = load(grad + i, size - i);
    Vector result;
    if (scoring == SOFTMAX)
      result = _mm512_mul_ps(p, _mm512_sub_ps(d, mean));
    else if (scoring == SIGMOID_SCORE)
      result = _mm512_mul_ps(_mm512_mul_ps(d, _mm512_sub_ps(constant(1.0f), p)), p);
    else
      result = _mm512_div_ps(_mm512_mul_ps(d, rise(_mm512_mul_ps(p, p))), _mm512_add_ps(p, p));
    store(grad + i, result, size - i);
  }
}

// The `top_k` experts of highest score + bias in descending order, the lower one first of two equal; a NaN is
// higher than any number. `rank` is a padded row for the sums as integers of the same order.
inline void best_experts(const float* row, const float* bias, index size, index top_k, int32_t* rank, index* ids) {
  const __m512i taken = _mm512_set1_epi32(std::numeric_limits<int32_t>::min());
  const __m512i highest = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
  for (index i = 0; i < size; i += LANES) {
    Vector v = _mm512_load_ps(row + i);
    if (bias) v = _mm512_add_ps(v, load(bias + i, size - i));
    const __m512i bits = _mm512_castps_si512(v), flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), highest);
    __m512i number = _mm512_xor_si512(bits, flip);
    number = _mm512_mask_mov_epi32(number, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), highest);
    _mm512_store_si512(rank + i, _mm512_mask_mov_epi32(taken, lanes_of(size - i), number));
  }
  for (index k = 0; k < top_k; ++k) {
    __m512i most = taken;
    for (index i = 0; i < size; i += LANES) most = _mm512_max_epi32(most, _mm512_load_si512(rank + i));
    most = _mm512_set1_epi32(_mm512_reduce_max_epi32(most));
    for (index i = 0; i < size; i += LANES) {
      const __m512i numbers = _mm512_load_si512(rank + i);
      const unsigned equal = _mm512_cmpeq_epi32_mask(numbers, most);
      if (!equal) continue;
      ids[k] = i + __builtin_ctz(equal);
      _mm512_store_si512(rank + i, _mm512_mask_mov_epi32(numbers, equal & -equal, taken));
      break;
    }
  }
}

// The highest score as an integer that sorts the higher ones first; a NaN goes before all.
inline uint32_t urgency(const float* row, index size) {
  __m512i most = _mm512_setzero_si512();
  __mmask16 has_nan = 0;
  for (index i = 0; i < size; i += LANES) {
    const __mmask16 lanes = lanes_of(size - i);
    const Vector v = _mm512_load_ps(row + i);
    has_nan |= _mm512_mask_cmp_ps_mask(lanes, v, v, _CMP_UNORD_Q);
    most = _mm512_mask_max_epu32(most, lanes, most, _mm512_castps_si512(v));  // none is negative: bits in order
  }
  return has_nan ? 0 : ~_mm512_reduce_max_epu32(most);
}

}  // namespace
