// Gate scores of one token and what follows from them: the best experts, and the gradient of the logits.
#pragma once
#include <cmath>
#include <limits>

#include "activations.h"
#include "block.h"

namespace {

constexpr index LANES = 16;

// The order of `SCORINGS` in route.py. UNIFORM scores are all 1, and the logits put the experts in order.
enum Scoring : index { SOFTMAX, SIGMOID_SCORE, SQRT_SOFTPLUS, UNIFORM };

inline index padded(index size) { return (size + LANES - 1) / LANES * LANES; }

// exp(x) for x <= 0; 0 below exp(-86.6) = 2.4e-38, as numbers that are not normal are slow. NaN stays NaN.
inline Vector decay(Vector x) {
  static const float series[] = {0.00139485808f, 0.00837512889f, 0.0416662183f, 0.166664155f,
                                 0.500000011f,   1.00000004f,    1.0f};
  const Mask vanishes = less(x, constant(-86.6f));
  x = maximum(constant(-86.6f), x);
  const Vector power = nearest_integer(mul(x, constant(1.44269504f)));
  Vector rest = fnmadd(power, constant(0.693145752f), x);
  rest = fnmadd(power, constant(1.42860677e-6f), rest);
  return zero_where(vanishes, scale(polynomial(rest, series), power));
}

// log(1 + u) = 2 artanh(u / (2 + u)) for 0 <= u <= 1, relative to its size.
inline Vector log_of_one_plus(Vector u) {
  static const float series[] = {2.0f / 15, 2.0f / 13, 2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f};
  const Vector s = divide(u, add(u, constant(2.0f)));
  return mul(s, polynomial(mul(s, s), series));
}

// 1 - exp(-s) for s >= 0, relative to its size.
inline Vector rise(Vector s) {
  static const float series[] = {-1.0f / 720, 1.0f / 120, -1.0f / 24, 1.0f / 6, -0.5f, 1.0f};
  const Vector far = sub(constant(1.0f), decay(sub(constant(0.0f), s)));
  const Vector near = mul(s, polynomial(s, series));
  return select(less(s, constant(0.25f)), near, far);
}

inline Vector score_of(Scoring scoring, Vector z) {
  const Vector one = constant(1.0f), e = decay(sub(constant(0.0f), magnitude(z)));
  if (scoring == SIGMOID_SCORE) {
    return divide(select(less(z, constant(0.0f)), e, one), add(one, e));
  }
  const Vector softplus = add(maximum(constant(0.0f), z), log_of_one_plus(e));
  return square_root(maximum(constant(std::numeric_limits<float>::min()), softplus));
}

// The scores of one token, in a row padded to whole vectors: what was stored in part is slow to load as a whole.
inline void softmax(const float* z, float* row, index size) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Vector most = constant(lowest), sum = constant(0.0f);
  for (index i = 0; i < size; i += LANES) most = maximum(load(z + i, size - i, lowest), most);
  const Vector peak = constant(reduce_max(most));
  for (index i = 0; i < size; i += LANES) {
    const Vector e = decay(sub(load(z + i, size - i, lowest), peak));
    store(row + i, e);
    sum = add_first(sum, e, size - i);
  }
  const Vector share = constant(1.0f / reduce_add(sum));
  for (index i = 0; i < size; i += LANES) store(row + i, mul(load(row + i), share));
}

inline void ones(float* row, index size) {
  for (index i = 0; i < size; i += LANES) store(row + i, constant(1.0f));
}

// What experts are ranked by: the scores, but for UNIFORM ones. A zero has no sign, which would count in the order.
inline void ranking(Scoring scoring, const float* z, float* row, index size) {
  if (scoring == UNIFORM) {
    for (index i = 0; i < size; i += LANES) store(row + i, add(load(z + i, size - i), constant(0.0f)));
    return;
  }
  if (scoring == SOFTMAX) return softmax(z, row, size);
  for (index i = 0; i < size; i += LANES) store(row + i, score_of(scoring, load(z + i, size - i)));
}

// The gradient of the logits from that of the scores, in place.
inline void scores_backward(Scoring scoring, const float* score, float* grad, index size) {
  Vector mean = constant(0.0f);
  if (scoring == SOFTMAX) {
    for (index i = 0; i < size; i += LANES)
      mean = fmadd(load(score + i, size - i), load(grad + i, size - i), mean);
    mean = constant(reduce_add(mean));
  }
  for (index i = 0; i < size; i += LANES) {
    const Vector p = load(score + i, size - i, 1.0f), d = load(grad + i, size - i);
    Vector result;
    if (scoring == SOFTMAX)
      result = mul(p, sub(d, mean));
    else if (scoring == SIGMOID_SCORE)
      result = mul(mul(d, sub(constant(1.0f), p)), p);
    else
      result = divide(mul(d, rise(mul(p, p))), add(p, p));
    store(grad + i, result, size - i);
  }
}

// The `top_k` experts of highest score + bias in descending order, the lower one first of two equal; a NaN is
// higher than any number. `rank` is a padded row for the sums as integers of the same order.
inline void best_experts(const float* row, const float* bias, index size, index top_k, int32_t* rank, index* ids) {
  const Integers taken = constant_integers(std::numeric_limits<int32_t>::min());
  const Integers highest = constant_integers(std::numeric_limits<int32_t>::max());
  for (index i = 0; i < size; i += LANES) {
    Vector v = load(row + i);
    if (bias) v = add(v, load(bias + i, size - i));
    store(rank + i, keep_first(select(is_nan(v), highest, ordered(v)), size - i, taken));
  }
  for (index k = 0; k < top_k; ++k) {
    Integers most = taken;
    for (index i = 0; i < size; i += LANES) most = maximum(most, load(rank + i));
    most = constant_integers(reduce_max(most));
    for (index i = 0; i < size; i += LANES) {
      const Integers numbers = load(rank + i);
      const uint32_t equal = equal_lanes(numbers, most);
      if (!equal) continue;
      ids[k] = i + __builtin_ctz(equal);
      store(rank + i, replace_lanes(numbers, equal & -equal, taken));
      break;
    }
  }
}

// The highest score as an integer that sorts the higher ones first; a NaN goes before all.
inline uint32_t urgency(const float* row, index size) {
  Integers most = constant_integers(0);
  bool has_nan = false;
  for (index i = 0; i < size; i += LANES) {
    const Vector v = keep_first(load(row + i), size - i);
    has_nan |= any(is_nan(v));
    most = maximum(most, bits_of(v));  // none is negative: bits in order
  }
  return has_nan ? 0 : ~uint32_t(reduce_max(most));
}

}  // namespace
