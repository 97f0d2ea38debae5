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

inline __mmask16 lanes_of(index left) { return left >= LANES ? 0xffff : (1u << left) - 1; }
inline Vector load(const float* from, index left, float other = 0.0f) {
  return _mm512_mask_loadu_ps(constant(other), lanes_of(left), from);
}
inline void store(float* to, Vector value, index left) { _mm512_mask_storeu_ps(to, lanes_of(left), value); }

// exp(x) for x <= 0, down to where it underflows; NaN stays NaN.
inline Vector decay(Vector x) {
  static const float series[] = {0.00139485808f, 0.00837512889f, 0.0416662183f, 0.166664155f,
                                 0.500000011f,   1.00000004f,    1.0f};
  x = _mm512_max_ps(constant(-110.0f), x);
  const Vector power = _mm512_roundscale_ps(_mm512_mul_ps(x, constant(1.44269504f)), 8);
  Vector rest = _mm512_fnmadd_ps(power, constant(0.693145752f), x);
  rest = _mm512_fnmadd_ps(power, constant(1.42860677e-6f), rest);
  return _mm512_scalef_ps(polynomial(rest, series), power);
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

inline void softmax(const float* z, float* score, index size) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Vector most = constant(lowest), sum = constant(0.0f);
  for (index i = 0; i < size; i += LANES) most = _mm512_max_ps(load(z + i, size - i, lowest), most);
  const Vector peak = constant(_mm512_reduce_max_ps(most));
  for (index i = 0; i < size; i += LANES) {
    const Vector e = decay(_mm512_sub_ps(load(z + i, size - i, lowest), peak));
    store(score + i, e, size - i);
    sum = _mm512_mask_add_ps(sum, lanes_of(size - i), sum, e);
  }
  const Vector share = constant(1.0f / _mm512_reduce_add_ps(sum));
  for (index i = 0; i < size; i += LANES) store(score + i, _mm512_mul_ps(load(score + i, size - i), share), size - i);
}

inline void scores(Scoring scoring, const float* z, float* score, index size) {
  if (scoring == SOFTMAX) return softmax(z, score, size);
  for (index i = 0; i < size; i += LANES) store(score + i, score_of(scoring, load(z + i, size - i)), size - i);
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
// higher than any number. Where all beyond them are lower, one comparison passes over 16 experts.
inline void best_experts(const float* score, const float* bias, index size, index top_k, float* value, index* ids) {
  index filled = 0;
  for (index i = 0; i < size; i += LANES) {
    Vector v = load(score + i, size - i);
    if (bias) v = _mm512_add_ps(v, load(bias + i, size - i));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    v = _mm512_mask_mov_ps(v, is_nan, constant(std::numeric_limits<float>::infinity()));
    unsigned left = lanes_of(size - i);
    if (filled == top_k) left &= _mm512_cmp_ps_mask(v, constant(value[top_k - 1]), _CMP_GT_OQ);
    if (!left) continue;
    float lane[LANES];
    _mm512_storeu_ps(lane, v);
    for (; left; left &= left - 1) {
      const int number = __builtin_ctz(left);
      if (filled == top_k && !(lane[number] > value[top_k - 1])) continue;
      index at = filled < top_k ? filled++ : top_k - 1;
      for (; at > 0 && lane[number] > value[at - 1]; --at) value[at] = value[at - 1], ids[at] = ids[at - 1];
      value[at] = lane[number], ids[at] = i + number;
    }
  }
}

// The highest score as an integer that sorts the higher ones first; a NaN goes before all.
inline uint32_t urgency(const float* score, index size) {
  uint32_t most = 0;
  __m512i top = _mm512_setzero_si512();
  __mmask16 has_nan = 0;
  for (index i = 0; i < size; i += LANES) {
    const Vector v = load(score + i, size - i);
    has_nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    top = _mm512_max_epu32(top, _mm512_castps_si512(v));  // scores are not negative: their bits are in order
  }
  most = _mm512_reduce_max_epu32(top);
  return has_nan ? 0 : ~most;
}

}  // namespace
