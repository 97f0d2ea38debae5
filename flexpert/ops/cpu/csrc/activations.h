// Named activations on 16 floats at a time, with their derivatives. Polynomials are least-squares fits. Where
// EXACT their relative error is below 6e-8; else, for results that are rounded to bf16 (2e-3), below 3e-4. A NaN
// stays a NaN: the operand that may be one comes second in min and max.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

using Vector = __m512;

inline Vector constant(float value) { return _mm512_set1_ps(value); }

// 1 / x for finite x: an estimate of 14 bits and, where EXACT, one step of Newton's method.
template <bool EXACT>
inline Vector inverse(Vector x) {
  const Vector guess = _mm512_rcp14_ps(x);
  if (!EXACT) return guess;
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, constant(2.0f)));
}

template <int N>
inline Vector polynomial(Vector x, const float (&coefficients)[N]) {  // highest power first
  Vector sum = constant(coefficients[0]);
  for (int i = 1; i < N; ++i) sum = _mm512_fmadd_ps(sum, x, constant(coefficients[i]));
  return sum;
}

inline Vector exponential(Vector x) {
  static const float series[] = {0.00139485808f, 0.00837512889f, 0.0416662183f, 0.166664155f,
                                 0.500000011f,   1.00000004f,    1.0f};
  x = _mm512_min_ps(constant(80.0f), _mm512_max_ps(constant(-80.0f), x));
  const Vector power = _mm512_roundscale_ps(_mm512_mul_ps(x, constant(1.44269504f)), 8);
  Vector rest = _mm512_fnmadd_ps(power, constant(0.693145752f), x);
  rest = _mm512_fnmadd_ps(power, constant(1.42860677e-6f), rest);
  return _mm512_scalef_ps(polynomial(rest, series), power);
}

// 2^x, for x rounded into the range of floats.
inline Vector rough_power_of_two(Vector x) {
  static const float series[] = {0.0551688457f, 0.242606846f, 0.693261041f, 0.999928369f};
  x = _mm512_min_ps(constant(126.0f), _mm512_max_ps(constant(-126.0f), x));
  const Vector power = _mm512_roundscale_ps(x, 8);
  return _mm512_scalef_ps(polynomial(_mm512_sub_ps(x, power), series), power);
}

template <bool EXACT>
inline Vector sigmoid(Vector x) {
  const Vector power = EXACT ? exponential(_mm512_sub_ps(constant(0.0f), x))
                             : rough_power_of_two(_mm512_mul_ps(x, constant(-1.44269504f)));
  return inverse<EXACT>(_mm512_add_ps(constant(1.0f), power));
}

inline Vector hyperbolic_tangent(Vector x) {
  static const float series[] = {-0.00566477536f, 0.02059568f, -0.0537226793f, 0.133311502f, -0.333332616f,
                                 0.999999996f};
  const Vector size = _mm512_abs_ps(x);
  const Vector near = _mm512_mul_ps(x, polynomial(_mm512_mul_ps(x, x), series));
  const Vector tail = inverse<true>(_mm512_add_ps(constant(1.0f), exponential(_mm512_add_ps(size, size))));
  const Vector far = _mm512_fnmadd_ps(constant(2.0f), tail, constant(1.0f));
  const Vector sign = _mm512_and_ps(x, constant(-0.0f));
  const __mmask16 is_far = _mm512_cmp_ps_mask(size, constant(0.625f), _CMP_GT_OQ);
  return _mm512_mask_or_ps(near, is_far, far, sign);
}

struct Normal {  // of the standard normal distribution
  Vector cumulative, density;
};

// erfc(z) = exp(-z^2) R(u) / (1 + 2 z) with u = (z - 3) / (z + 3), for z >= 0.
inline Normal normal(Vector x) {
  static const float series[] = {-0.000233169274f, 0.00207424749f, 0.00214696015f, -0.0239555797f,
                                 0.0684074213f,    -0.119225489f,  0.129634629f,   -0.0475661445f,
                                 -0.135620759f,    1.2530081f};
  const Vector z = _mm512_min_ps(constant(12.0f), _mm512_mul_ps(_mm512_abs_ps(x), constant(0.707106781f)));
  const Vector gauss = exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), constant(-0.5f)));
  const Vector three = constant(3.0f), sum = _mm512_add_ps(z, three);
  const Vector line = _mm512_fmadd_ps(z, constant(2.0f), constant(1.0f));
  const Vector shared = inverse<true>(_mm512_mul_ps(sum, line));
  const Vector u = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(z, three), line), shared);
  const Vector scaled = _mm512_mul_ps(_mm512_mul_ps(gauss, constant(0.5f)), _mm512_mul_ps(sum, shared));
  const Vector tail = _mm512_mul_ps(scaled, polynomial(u, series));
  const __mmask16 right = _mm512_cmp_ps_mask(x, constant(0.0f), _CMP_GT_OQ);
  return {_mm512_mask_sub_ps(tail, right, constant(1.0f), tail),
          _mm512_mul_ps(gauss, constant(0.39894228f))};
}

// The tail is exp(-x^2 / 2) times a polynomial without constant term of t = 1 / (1 + 0.26 |x|).
inline Normal rough_normal(Vector x) {
  static const float series[] = {0.167148717f, 0.0132741733f, 0.111869628f, 0.104454651f, 0.103287383f};
  const Vector t = _mm512_rcp14_ps(_mm512_fmadd_ps(_mm512_abs_ps(x), constant(0.26f), constant(1.0f)));
  const Vector gauss = rough_power_of_two(_mm512_mul_ps(_mm512_mul_ps(x, constant(-0.721347520f)), x));
  const Vector tail = _mm512_mul_ps(_mm512_mul_ps(gauss, t), polynomial(t, series));
  const __mmask16 right = _mm512_cmp_ps_mask(x, constant(0.0f), _CMP_GT_OQ);
  return {_mm512_mask_sub_ps(tail, right, constant(1.0f), tail),
          _mm512_mul_ps(gauss, constant(0.39894228f))};
}

struct Both {
  Vector value, slope;
};

// The order of `NAMES` in backend.py.
enum Activation : int64_t { GELU, GELU_TANH, IDENTITY, RELU, SIGMOID, SILU, SQUARED_RELU, TANH };

template <int64_t KIND, bool EXACT>
inline Both activate(Vector x) {
  const Vector zero = constant(0.0f), one = constant(1.0f);
  if constexpr (KIND == GELU) {
    const Normal n = EXACT ? normal(x) : rough_normal(x);
    return {_mm512_mul_ps(x, n.cumulative), _mm512_fmadd_ps(x, n.density, n.cumulative)};
  } else if constexpr (KIND == GELU_TANH) {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    const Vector square = _mm512_mul_ps(x, x), scale = constant(1.59576912f);
    const Vector twice_u = _mm512_mul_ps(_mm512_mul_ps(scale, x),
                                         _mm512_fmadd_ps(square, constant(0.044715f), one));
    const Vector gate = sigmoid<EXACT>(twice_u), value = _mm512_mul_ps(x, gate);
    const Vector inner = _mm512_mul_ps(scale, _mm512_fmadd_ps(square, constant(0.134145f), one));
    const Vector bend = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_sub_ps(one, gate)), inner);
    return {value, _mm512_add_ps(gate, bend)};
  } else if constexpr (KIND == IDENTITY) {
    return {x, one};
  } else if constexpr (KIND == RELU) {
    const Vector value = _mm512_max_ps(zero, x);
    return {value, _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero, _CMP_NLE_UQ), zero, one)};
  } else if constexpr (KIND == SIGMOID) {
    const Vector value = sigmoid<EXACT>(x);
    return {value, _mm512_fnmadd_ps(value, value, value)};
  } else if constexpr (KIND == SILU) {
    const Vector gate = sigmoid<EXACT>(x), value = _mm512_mul_ps(x, gate);
    return {value, _mm512_fmadd_ps(value, _mm512_sub_ps(one, gate), gate)};
  } else if constexpr (KIND == SQUARED_RELU) {
    const Vector value = _mm512_max_ps(zero, x);
    return {_mm512_mul_ps(value, value), _mm512_add_ps(value, value)};
  } else {
    const Vector value = hyperbolic_tangent(x);
    return {value, _mm512_fnmadd_ps(value, value, one)};
  }
}

constexpr int64_t ACTIVATIONS = 8;

}  // namespace
