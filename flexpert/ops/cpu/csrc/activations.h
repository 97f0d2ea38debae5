// Named activations on 16 floats at a time, with their derivatives. Polynomials are least-squares fits. Where
// EXACT their relative error is below 6e-8; else, for results that are rounded to bf16 (2e-3), below 3e-4. A NaN
// stays a NaN: the operand that may be one comes second in min and max.
#pragma once
#include <cstdint>

#include "vector.h"

namespace {

template <int N>
inline Vector polynomial(Vector x, const float (&coefficients)[N]) {  // highest power first
  Vector sum = constant(coefficients[0]);
  for (int i = 1; i < N; ++i) sum = fmadd(sum, x, constant(coefficients[i]));
  return sum;
}

inline Vector exponential(Vector x) {
  static const float series[] = {0.00139485808f, 0.00837512889f, 0.0416662183f, 0.166664155f,
                                 0.500000011f,   1.00000004f,    1.0f};
  x = minimum(constant(80.0f), maximum(constant(-80.0f), x));
  const Vector power = nearest_integer(mul(x, constant(1.44269504f)));
  Vector rest = fnmadd(power, constant(0.693145752f), x);
  rest = fnmadd(power, constant(1.42860677e-6f), rest);
  return scale(polynomial(rest, series), power);
}

// 2^x, for x rounded into the range of floats.
inline Vector rough_power_of_two(Vector x) {
  static const float series[] = {0.0551688457f, 0.242606846f, 0.693261041f, 0.999928369f};
  x = minimum(constant(126.0f), maximum(constant(-126.0f), x));
  const Vector power = nearest_integer(x);
  return scale(polynomial(sub(x, power), series), power);
}

template <bool EXACT>
inline Vector sigmoid(Vector x) {
  const Vector power = EXACT ? exponential(sub(constant(0.0f), x))
                             : rough_power_of_two(mul(x, constant(-1.44269504f)));
  return inverse<EXACT>(add(constant(1.0f), power));
}

inline Vector hyperbolic_tangent(Vector x) {
  static const float series[] = {-0.00566477536f, 0.02059568f, -0.0537226793f, 0.133311502f, -0.333332616f,
                                 0.999999996f};
  const Vector size = magnitude(x);
  const Vector near = mul(x, polynomial(mul(x, x), series));
  const Vector tail = inverse<true>(add(constant(1.0f), exponential(add(size, size))));
  const Vector far = fnmadd(constant(2.0f), tail, constant(1.0f));
  const Vector sign = bits_and(x, constant(-0.0f));
  return select(greater(size, constant(0.625f)), bits_or(far, sign), near);
}

struct Normal {  // of the standard normal distribution
  Vector cumulative, density;
};

// erfc(z) = exp(-z^2) R(u) / (1 + 2 z) with u = (z - 3) / (z + 3), for z >= 0.
inline Normal normal(Vector x) {
  static const float series[] = {-0.000233169274f, 0.00207424749f, 0.00214696015f, -0.0239555797f,
                                 0.0684074213f,    -0.119225489f,  0.129634629f,   -0.0475661445f,
                                 -0.135620759f,    1.2530081f};
  const Vector z = minimum(constant(12.0f), mul(magnitude(x), constant(0.707106781f)));
  const Vector gauss = exponential(mul(mul(x, x), constant(-0.5f)));
  const Vector three = constant(3.0f), sum = add(z, three);
  const Vector line = fmadd(z, constant(2.0f), constant(1.0f));
  const Vector shared = inverse<true>(mul(sum, line));
  const Vector u = mul(mul(sub(z, three), line), shared);
  const Vector scaled = mul(mul(gauss, constant(0.5f)), mul(sum, shared));
  const Vector tail = mul(scaled, polynomial(u, series));
  const Vector cumulative = select(greater(x, constant(0.0f)), sub(constant(1.0f), tail), tail);
  return {cumulative, mul(gauss, constant(0.39894228f))};
}

// The tail is exp(-x^2 / 2) times a polynomial without constant term of t = 1 / (1 + 0.26 |x|).
inline Normal rough_normal(Vector x) {
  static const float series[] = {0.167148717f, 0.0132741733f, 0.111869628f, 0.104454651f, 0.103287383f};
  const Vector t = inverse<false>(fmadd(magnitude(x), constant(0.26f), constant(1.0f)));
  const Vector gauss = rough_power_of_two(mul(mul(x, constant(-0.721347520f)), x));
  const Vector tail = mul(mul(gauss, t), polynomial(t, series));
  const Vector cumulative = select(greater(x, constant(0.0f)), sub(constant(1.0f), tail), tail);
  return {cumulative, mul(gauss, constant(0.39894228f))};
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
    return {mul(x, n.cumulative), fmadd(x, n.density, n.cumulative)};
  } else if constexpr (KIND == GELU_TANH) {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    const Vector square = mul(x, x), scale = constant(1.59576912f);
    const Vector twice_u = mul(mul(scale, x), fmadd(square, constant(0.044715f), one));
    const Vector gate = sigmoid<EXACT>(twice_u), value = mul(x, gate);
    const Vector inner = mul(scale, fmadd(square, constant(0.134145f), one));
    const Vector bend = mul(mul(value, sub(one, gate)), inner);
    return {value, add(gate, bend)};
  } else if constexpr (KIND == IDENTITY) {
    return {x, one};
  } else if constexpr (KIND == RELU) {
    const Vector value = maximum(zero, x);
    return {value, select(not_at_most(x, zero), one, zero)};
  } else if constexpr (KIND == SIGMOID) {
    const Vector value = sigmoid<EXACT>(x);
    return {value, fnmadd(value, value, value)};
  } else if constexpr (KIND == SILU) {
    const Vector gate = sigmoid<EXACT>(x), value = mul(x, gate);
    return {value, fmadd(value, sub(one, gate), gate)};
  } else if constexpr (KIND == SQUARED_RELU) {
    const Vector value = maximum(zero, x);
    return {mul(value, value), add(value, value)};
  } else {
    const Vector value = hyperbolic_tangent(x);
    return {value, fnmadd(value, value, one)};
  }
}

constexpr int64_t ACTIVATIONS = 8;

}  // namespace
