// Logits of few tokens: x W^T in fp32 from operands as they are stored. Each sum is one thread's, in the order of
// its terms, whatever the number of tokens and threads.
#pragma once
#include "activations.h"
#include "block.h"
#include "threads.h"

namespace {

using Half = uint16_t;  // bf16 by its bits

inline Vector widen(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline Vector widen(const Half* from, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

struct LogitsCall {
  index tokens, experts, size, threads, x, w, logits;
};

// TOKENS x EXPERTS logits from (t, e) on; rows past the last are the last again, and not stored.
template <int TOKENS, int EXPERTS, typename Element>
void logits_block(const LogitsCall& c, index t, index e) {
  const Element *x[TOKENS], *w[EXPERTS];
  for (int i = 0; i < TOKENS; ++i) x[i] = pointer<Element>(c.x) + least(t + i, c.tokens - 1) * c.size;
  for (int j = 0; j < EXPERTS; ++j) w[j] = pointer<Element>(c.w) + least(e + j, c.experts - 1) * c.size;
  Vector sum[TOKENS][EXPERTS];
  for (auto& row : sum)
    for (Vector& entry : row) entry = constant(0.0f);
  for (index d = 0; d < c.size; d += 16) {
    const __mmask16 lanes = c.size - d >= 16 ? 0xffff : (1u << (c.size - d)) - 1;
    Vector right[EXPERTS];
    for (int j = 0; j < EXPERTS; ++j) right[j] = widen(w[j] + d, lanes);
    for (int i = 0; i < TOKENS; ++i) {
      const Vector left = widen(x[i] + d, lanes);
      for (int j = 0; j < EXPERTS; ++j) sum[i][j] = _mm512_fmadd_ps(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < TOKENS && t + i < c.tokens; ++i)
    for (int j = 0; j < EXPERTS && e + j < c.experts; ++j)
      pointer<float>(c.logits)[(t + i) * c.experts + e + j] = _mm512_reduce_add_ps(sum[i][j]);
}

template <typename Element>
void logits_of(const LogitsCall& c) {
  constexpr index LITTLE = 1 << 18;  // products
  const index threads = c.tokens * c.experts * c.size < LITTLE ? 1 : c.threads;
  on_threads(threads, [&] {
#pragma omp for schedule(static)
    for (index e = 0; e < c.experts; e += 8) {
      if (c.tokens == 1) {
        logits_block<1, 8, Element>(c, 0, e);
        continue;
      }
      for (index half = e; half < least(e + 8, c.experts); half += 4)
        for (index t = 0; t < c.tokens; t += 4) logits_block<4, 4, Element>(c, t, half);
    }
  });
}

}  // namespace
