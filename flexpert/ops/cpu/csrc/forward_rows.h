// A forward call, and what becomes of a block of its sums: rows of the hidden layer, or results.
#pragma once
#include "calls.h"
#include "mlp_common.h"

namespace {

// A block of the hidden layer from its pre-activation: with bias, saved for backward, activated, packed.
struct HiddenRows {
  using Row = void (*)(const HiddenRows&, index, Sums);
  index steps = 0, count = 0;
  index width = 0, stride = 0, halves = 0;
  Row row = nullptr;
  const Element* bias = nullptr;
  Element *pre = nullptr, *tile = nullptr;
  index tile_stride = BLOCK;

  void step(index r, Sums sums) const {
    if (r < count)
      row(*this, r, sums);
    else
      store_32(tile + r * BLOCK, constant(0.0f), constant(0.0f), BLOCK);
  }

  // 16 columns of one half from `i` on.
  Vector value(index r, index half, index i, Sums sums) const {
    const Vector sum = load(sums[half] + r * BLOCK + i);
    return bias ? add(sum, load_row(bias + half * stride + i, width - i)) : sum;
  }
};

template <index KIND>
void hidden_row(const HiddenRows& h, index r, Sums sums) {
  Vector low = h.value(r, 0, 0, sums), high = h.value(r, 0, 16, sums);
  if (h.pre) store_32(h.pre + r * h.halves * h.stride, low, high, h.width);
  low = activate<KIND>(low).value, high = activate<KIND>(high).value;
  if (h.halves == 2) {
    const Vector up_low = h.value(r, 1, 0, sums), up_high = h.value(r, 1, 16, sums);
    if (h.pre) store_32(h.pre + (r * 2 + 1) * h.stride, up_low, up_high, h.width);
    low = mul(low, up_low), high = mul(high, up_high);
  }
  store_32(h.tile + r * h.tile_stride, low, high, BLOCK);
}

template <index... KIND>
constexpr std::array<HiddenRows::Row, sizeof...(KIND)> hidden_row_table(std::integer_sequence<index, KIND...>) {
  return {hidden_row<KIND>...};
}
constexpr auto HIDDEN_ROW = hidden_row_table(std::make_integer_sequence<index, ACTIVATIONS>());

// Of `count` rows from `start` on, which an expert with the weights of `slot` computes; a column block.
inline HiddenRows hidden_rows(const ForwardCall& c, index start, index count, index slot, index column, Element* tile) {
  const index first = column * BLOCK;
  HiddenRows result;
  result.steps = EVEN ? count : BLOCK;
  result.count = count;
  result.width = c.hidden - first;
  result.stride = c.hidden;
  result.halves = c.gated ? 2 : 1;
  result.row = HIDDEN_ROW[c.activation];
  if (c.b1) result.bias = pointer<Element>(c.b1) + slot * result.halves * c.hidden + first;
  if (c.pre) result.pre = pointer<Element>(c.pre) + start * result.halves * c.hidden + first;
  result.tile = tile;
  return result;
}

inline StoreRows output_rows(const ForwardCall& c, index start, index count, index slot, index column) {
  const index at = column * BLOCK;
  return {count, pointer<Element>(c.y_rows) + start * c.output + at, c.output, c.output - at,
          c.b2 ? pointer<Element>(c.b2) + slot * c.output + at : nullptr};
}

}  // namespace
