// Logits of many tokens in bf16, x W^T in fp32, and their gradients, as products of packed blocks: nothing of the size of
// x is widened or written but the gradient of x. For few tokens see logits.h.
#pragma once
#include "calls.h"
#include "mlp_common.h"

namespace {

struct ScoreCall {  // in the order of `_SCORE` in route.py
  index tokens, experts, size, threads, amx, x, w, logits;
};

struct ScoreBackwardCall {  // in the order of `_SCORE_BACKWARD`; gradients not asked for are null
  index tokens, experts, size, threads, amx, grad, x, w, d_x, d_w;
};

inline index score(const ScoreCall& c) {
  const index depth = blocks(c.size), columns = blocks(c.experts);
  Scratch scratch(Scratch::size<Element>(columns * depth * TILE) + Scratch::size<Element>(c.threads * depth * TILE));
  if (!scratch) return NO_MEMORY;
  Element *panels = scratch.take<Element>(columns * depth * TILE), *lefts = scratch.take<Element>(c.threads * depth * TILE);
  on_threads(c.threads, [&] {
    const Multiplier multiply(c.amx);
    Element* left = lefts + omp_get_thread_num() * depth * TILE;
    alignas(64) float sums[1][TILE];
#pragma omp for schedule(static)
    for (index j = 0; j < columns; ++j)
      pack_columns(panels + j * depth * TILE, pointer<Element>(c.w), c.experts, c.size, j * BLOCK);
#pragma omp for schedule(static)
    for (index t = 0; t < c.tokens; t += BLOCK) {
      const index count = least(BLOCK, c.tokens - t);
      const Rows rows(pointer<Element>(c.x) + t * c.size, c.size, count);
      for (index k = 0; k < depth; ++k) pack_left(left + k * TILE, rows.at, k * BLOCK, c.size - k * BLOCK);
      for (index j = 0; j < columns; ++j) {
        multiply({left, panels + j * depth * TILE, 0, 1, c.size}, sums, count, [] {});
        float* target = pointer<float>(c.logits) + t * c.experts + j * BLOCK;
        const index width = c.experts - j * BLOCK;
        for (index r = 0; r < count; ++r, target += c.experts)
          for (index i = 0; i < BLOCK; i += 16) store_row(target + i, load(sums[0] + r * BLOCK + i), width - i);
      }
    }
  });
  return DONE;
}

// d x = grad W and d W = grad^T x. The gradient is a sum of two numbers in bf16, high and low, which keep 16 bits of it.
class ScoreBackward {
 public:
  explicit ScoreBackward(const ScoreBackwardCall& call)
      : c(call), experts(blocks(c.experts)), size(blocks(c.size)), tokens(blocks(c.tokens)) {}

  index run() {
    const index weights = c.d_x ? size * 2 * experts * TILE : 0, turned = c.d_w ? 2 * experts * tokens * TILE : 0;
    const index tiles = c.threads * 2 * experts * TILE, panels = c.d_w ? c.threads * WIDE * RUN * TILE : 0;
    const index totals = c.d_w ? c.threads * experts * WIDE * TILE : 0;
    Scratch scratch(Scratch::size<Element>(weights) + Scratch::size<Element>(turned) + Scratch::size<Element>(tiles) +
                    Scratch::size<Element>(panels) + Scratch::size<float>(totals));
    if (!scratch) return NO_MEMORY;
    packed_w = scratch.take<Element>(weights), grad_turned = scratch.take<Element>(turned);
    Element *of_grad = scratch.take<Element>(tiles), *of_x = scratch.take<Element>(panels);
    float* sums = scratch.take<float>(totals);
    on_threads(c.threads, [&] {
      const Multiplier multiply(c.amx);
      const index thread = omp_get_thread_num();
      Element *grad = of_grad + thread * 2 * experts * TILE, *panel = of_x + thread * WIDE * RUN * TILE;
      if (c.d_x) pack_weights();
#pragma omp for schedule(static)
      for (index b = 0; b < tokens; ++b) {
        split(b, grad);
        if (c.d_w) turn(b, grad);
        if (c.d_x) input_gradient(b, grad, multiply);
      }
      if (!c.d_w) return;
#pragma omp for schedule(dynamic)
      for (index first = 0; first < size; first += WIDE)
        weight_gradient(first, panel, sums + thread * experts * WIDE * TILE, multiply);
    });
    return DONE;
  }

 private:
  // Column blocks of x that are packed side by side, and blocks of tokens of a product: 256 KiB together.
  static constexpr index WIDE = 4, RUN = 32;

  // Right operands of all column blocks, whose k are the experts, twice: for high and low.
  void pack_weights() const {
#pragma omp for schedule(static)
    for (index j = 0; j < size; ++j)
      for (index e = 0; e < experts; ++e) {
        const Rows rows(pointer<Element>(c.w) + e * BLOCK * c.size, c.size, c.experts - e * BLOCK);
        for (index half = 0; half < 2; ++half)
          pack_right(packed_w + ((j * 2 + half) * experts + e) * TILE, rows.at, j * BLOCK, c.size - j * BLOCK);
      }
  }

  // The gradient of a block of tokens as left operands: high [expert block], low [expert block].
  void split(index b, Element* tiles) const {
    const index count = least(BLOCK, c.tokens - b * BLOCK);
    for (index e = 0; e < experts; ++e) {
      const float* row = pointer<float>(c.grad) + b * BLOCK * c.experts + e * BLOCK;
      Element *high = tiles + e * TILE, *low = tiles + (experts + e) * TILE;
      for (index r = 0; r < BLOCK; ++r, row += c.experts, high += BLOCK, low += BLOCK) {
        const index width = r < count ? c.experts - e * BLOCK : 0;
        const Vector first = load_row(r < count ? row : nullptr, width);
        const Vector second = load_row(r < count ? row + 16 : nullptr, width - 16);
        store_32(high, first, second, BLOCK);
        store_32(low, sub(first, load_row(high, 16)), sub(second, load_row(high + 16, 16)), BLOCK);
      }
    }
  }

  void turn(index b, const Element* tiles) const {
    for (index i = 0; i < 2 * experts; ++i)
      pack_left_transposed(grad_turned + (i * tokens + b) * TILE, Rows(tiles + i * TILE, BLOCK, BLOCK).at, 0, BLOCK);
  }

  void input_gradient(index b, const Element* grad, const Multiplier& multiply) const {
    const index count = least(BLOCK, c.tokens - b * BLOCK), depth = 2 * experts;
    alignas(64) float sums[1][TILE];
    for (index j = 0; j < size; ++j) {
      multiply({grad, packed_w + j * depth * TILE, 0, 1, depth * BLOCK}, sums, count, [] {});
      Element* target = pointer<Element>(c.d_x) + b * BLOCK * c.size + j * BLOCK;
      for (index r = 0; r < count; ++r, target += c.size)
        store_32(target, load(sums[0] + r * BLOCK), load(sums[0] + r * BLOCK + 16), c.size - j * BLOCK);
    }
  }

  // Of some column blocks: runs of tokens one after the other, each added to the `totals` of those before.
  void weight_gradient(index first, Element* panel, float* totals, const Multiplier& multiply) const {
    const index number = least(WIDE, size - first);
    std::fill(totals, totals + experts * WIDE * TILE, 0.0f);
    for (index b = 0; b < tokens; b += RUN) {
      const index depth = least(RUN, tokens - b), count = least(RUN * BLOCK, c.tokens - b * BLOCK);
      pack_columns_of_k(panel, depth, pointer<Element>(c.x) + b * BLOCK * c.size, c.size, count, first, number);
      for (index half = 0; half < 2; ++half)
        for (index e = 0; e < experts; ++e)
          for (index i = 0; i < number; ++i)
            add_product(grad_turned + ((half * experts + e) * tokens + b) * TILE, panel + i * depth * TILE, count,
                        totals + (e * WIDE + i) * TILE, multiply);
    }
    for (index e = 0; e < c.experts; ++e)
      for (index i = 0; i < number; ++i) {
        const float* total = totals + (e / BLOCK * WIDE + i) * TILE + e % BLOCK * BLOCK;
        const index at = (first + i) * BLOCK;
        store_32(pointer<Element>(c.d_w) + e * c.size + at, load(total), load(total + 16), c.size - at);
      }
  }

  void add_product(const Element* left, const Element* right, index depth, float* total,
                   const Multiplier& multiply) const {
    alignas(64) float sums[1][TILE];
    const index rows = least(BLOCK, c.experts);
    multiply({left, right, 0, 1, depth}, sums, rows, [] {});
    for (index i = 0; i < rows * BLOCK; i += 16) store(total + i, add(load(total + i), load(sums[0] + i)));
  }

  const ScoreBackwardCall& c;
  const index experts, size, tokens;  // in blocks
  Element *packed_w = nullptr, *grad_turned = nullptr;
};

}  // namespace
