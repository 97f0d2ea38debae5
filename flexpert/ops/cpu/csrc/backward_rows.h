// A backward call, and what becomes of a block of its sums: gradients of the hidden layer, and of the rows.
#pragma once
#include "mlp_common.h"

namespace {

struct BackwardCall {  // in the order of `BACKWARD` in backend.py
  index units, rows, model, hidden, output, experts, slots, gated, activation, threads, amx;
  index x, unit, weight, counts, slot, w1, w2, b2, grad, pre;
  index d_rows, d_x, d_weight, d_w1, d_b1, d_w2, d_b2;
};

// A block of g, and all that follows from it elementwise: rows of weight * hidden and weight * d pre, which last
// steps pack into the operands of the products over rows, unless these are TURNED.
struct HiddenGradient {
  using Row = void (*)(const HiddenGradient&, index, const float*);
  index steps = 0, count = 0;
  index width = 0, stride = 0, halves = 0, weight_stride = 0;
  Row row = nullptr;
  const Element* pre = nullptr;      // the first of its rows, at the block's columns
  index next = 0;                    // from there to those of the next product
  const float* weight = nullptr;     // of its rows
  float* weight_parts = nullptr;     // of its rows, at its column
  float (*d_bias)[BLOCK] = nullptr;  // [half][column]
  Element* hidden_rows = nullptr;
  Element* hidden_right = nullptr;
  Element* d_pre_rows[2] = {};
  Element* d_pre_transposed[2] = {};

  void step(index r, Sums sums) const {
    if (r >= BLOCK)
      pack(r - BLOCK);
    else if (r < count)
      row(*this, r, sums[0] + r * BLOCK);
    else
      clear_row(r);
  }

  void put(index r, index half, Vector low, Vector high) const {
    if (d_pre_rows[half]) store_32(d_pre_rows[half] + r * BLOCK, low, high, BLOCK);
    if (!d_bias) return;
    float* sums = d_bias[half];
    store(sums, add(load(sums), low));
    store(sums + 16, add(load(sums + 16), high));
  }

 private:
  void clear_row(index r) const {
    const Vector zero = constant(0.0f);
    if (hidden_right) store_32(hidden_rows + r * BLOCK, zero, zero, BLOCK);
    for (index half = 0; half < halves; ++half)
      if (d_pre_rows[half]) store_32(d_pre_rows[half] + r * BLOCK, zero, zero, BLOCK);
  }

  void pack(index part) const {
    if (part == halves) {
      if (hidden_right) pack_right(hidden_right, Rows(hidden_rows, BLOCK, BLOCK).at, 0, BLOCK);
    } else if (d_pre_transposed[part]) {
      pack_left_transposed(d_pre_transposed[part], Rows(d_pre_rows[part], BLOCK, BLOCK).at, 0, BLOCK);
    }
  }
};

template <index KIND>
void hidden_gradient_row(const HiddenGradient& h, index r, const float* grad) {
  const Vector factor = constant(h.weight ? h.weight[r] : 1.0f);
  const Element *gate = h.pre + r * h.halves * h.stride, *up = gate + h.stride;
  for (index half = 0; half < h.halves; ++half) {
    prefetch(gate + half * h.stride + h.next);
    if (sizeof(Element) == 4) prefetch(gate + half * h.stride + h.next + 16);
  }
  Vector value[2], d_gate[2], d_up[2], product[2];
  for (int i = 0; i < 2; ++i) {
    const Vector g = load(grad + 16 * i), weighted = mul(g, factor);
    const Both act = activate<KIND>(load_row(gate + 16 * i, h.width - 16 * i));
    value[i] = act.value;
    d_gate[i] = mul(weighted, act.slope);
    if (h.halves == 2) {
      const Vector times = load_row(up + 16 * i, h.width - 16 * i);
      d_up[i] = mul(weighted, act.value);
      value[i] = mul(act.value, times);
      d_gate[i] = mul(d_gate[i], times);
    }
    product[i] = mul(g, value[i]);
    value[i] = mul(value[i], factor);
  }
  if (h.weight_parts)
    h.weight_parts[r * h.weight_stride] = reduce_add(add(product[0], product[1]));
  if (h.hidden_right) store_32(h.hidden_rows + r * BLOCK, value[0], value[1], BLOCK);
  h.put(r, 0, d_gate[0], d_gate[1]);
  if (h.halves == 2) h.put(r, 1, d_up[0], d_up[1]);
}

template <index... KIND>
constexpr std::array<HiddenGradient::Row, sizeof...(KIND)> hidden_gradient_table(
    std::integer_sequence<index, KIND...>) {
  return {hidden_gradient_row<KIND>...};
}
constexpr auto HIDDEN_GRADIENT_ROW = hidden_gradient_table(std::make_integer_sequence<index, ACTIVATIONS>());

// Rows of a result whose k come in spans: their sums wait in fp32 for the next one, which goes on with them.
struct SpanRows {
  index steps = 0;  // rows
  Element* target = nullptr;
  index stride = 0, width = 0;
  float* waiting = nullptr;  // one block; null in the last span

  void step(index r, Sums sums) const {
    const Vector low = load(sums[0] + r * BLOCK), high = load(sums[0] + r * BLOCK + 16);
    if (!waiting) return store_32(target + r * stride, low, high, width);
    store(waiting + r * BLOCK, low);
    store(waiting + r * BLOCK + 16, high);
  }
};

}  // namespace
