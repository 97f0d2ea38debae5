// Logits of few tokens: x W^T in fp32 from operands as they are stored. Each sum is one thread's, in the order of
// its terms, whatever the number of tokens and threads.
#pragma once
#include "activations.h"
#include "block.h"
#include "calls.h"
#include "threads.h"

namespace {

using Half = uint16_t;  // bf16 by its bits

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
    const index left = c.size - d;
    Vector right[EXPERTS];
    for (int j = 0; j < EXPERTS; ++j) right[j] = load(w[j] + d, left);
    for (int i = 0; i < TOKENS; ++i) {
      const Vector token = load(x[i] + d, left);
      for (int j = 0; j < EXPERTS; ++j) sum[i][j] = fmadd(token, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < TOKENS && t + i < c.tokens; ++i)
    for (int j = 0; j < EXPERTS && e + j < c.experts; ++j)
      pointer<float>(c.logits)[(t + i) * c.experts + e + j] = reduce_add(sum[i][j]);
}

template <typename Element>
void logits_of(const LogitsCall& c) {
  constexpr index LITTLE = 1 << 18;  // products
  const index threads = c.tokens * c.experts * c.size < LITTLE ? 1 : c.threads;
  on_threads(threads, [&] {
#pragma omp for schedule(static)
    for (index e = 0; e < c.experts; e += 8) {
      const index end = least(e + 8, c.experts);
      if (c.tokens == 1) {
        for (index part = e; part < end; part += LOGITS_OF_ONE) logits_block<1, LOGITS_OF_ONE, Element>(c, 0, part);
        continue;
      }
      for (index part = e; part < end; part += LOGITS_SIDE)
        for (index t = 0; t < c.tokens; t += LOGITS_SIDE)
          logits_block<LOGITS_SIDE, LOGITS_SIDE, Element>(c, t, part);
    }
  });
}

}  // namespace
