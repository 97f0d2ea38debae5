// Gradients of the grouped MLP. With g = w2^T dy[unit], before weighting:
//   d weight = g . hidden + dy . b2        d pre = weight * g * act'(pre)
//   d w2 = sum dy (weight * hidden)^T      d w1 = sum d pre x^T      d x[unit] += w1^T d pre
// so that dy and x are used as they are, and the weight enters in fp32. Gradients not asked for are null.
#pragma once
#include "mlp_common.h"

namespace {

struct BackwardCall {  // in the order of `BACKWARD` in backend.py
  index units, rows, model, hidden, output, experts, slots, gated, activation, threads, amx;
  index x, unit, weight, counts, slot, w1, w2, b2, grad, pre;
  index d_x, d_weight, d_w1, d_b1, d_w2, d_b2;
};

class Backward {
 public:
  Backward(const BackwardCall& call, const Plan& plan)
      : c(call), plan(plan), halves(call.gated ? 2 : 1), model(blocks(c.model)), hidden(blocks(c.hidden)),
        output(blocks(c.output)), needs_hidden(c.d_x || c.d_w1 || c.d_b1 || c.d_weight || c.d_w2) {}

  // The size of all buffers; with memory given, their places as well.
  size_t place(Scratch* memory) {
    size_t total = 0;
    const index rows = plan.most_blocks;
    const auto buffer = [&](auto*& target, bool is_needed, index size) {
      using T = std::remove_reference_t<decltype(*target)>;
      target = memory && is_needed ? memory->take<T>(size) : nullptr;
      if (is_needed) total += Scratch::size<T>(size);
    };
    buffer(dy_left, needs_hidden, rows * output * TILE);
    buffer(dy_transposed, c.d_w2, rows * output * TILE);
    buffer(x_right, c.d_w1, rows * model * TILE);
    buffer(d_pre_left, c.d_x, rows * halves * hidden * TILE);
    buffer(d_pre_transposed, c.d_w1, rows * halves * hidden * TILE);
    buffer(hidden_right, c.d_w2, rows * hidden * TILE);
    buffer(weight_parts, c.d_weight, rows * hidden * BLOCK);
    buffer(panels, true, c.threads * panel_size());
    buffer(sums, c.d_x && sizeof(Element) != 4, c.units * c.model);
    if (sizeof(Element) == 4) sums = pointer<float>(c.d_x);
    return total;
  }

  void run() {
    prefer_huge_pages(c.d_x, c.units * c.model * sizeof(Element));
    prefer_huge_pages(c.d_w1, c.slots * halves * c.hidden * c.model * sizeof(Element));
    prefer_huge_pages(c.d_w2, c.slots * c.output * c.hidden * sizeof(Element));
    on_threads(c.threads, [&] {
      const Multiplier multiply(c.amx);
      Element* panel = panels + omp_get_thread_num() * panel_size();
      clear_all();
      for (const Wave& wave : plan.waves) {
        pack_dy_rows(wave);
        pack_columns_of_rows(wave);
        if (needs_hidden) hidden_gradient(wave, multiply, panel);
        if (c.d_weight) sum_weight_parts(wave);
        if (c.d_w2) outer_product(wave, multiply, pointer<Element>(c.d_w2), dy_transposed, output, c.output, 1,
                                  hidden_right, hidden, c.hidden);
        if (c.d_w1) outer_product(wave, multiply, pointer<Element>(c.d_w1), d_pre_transposed, hidden, c.hidden,
                                  halves, x_right, model, c.model);
        if (c.d_x) input_gradient(wave, multiply, panel);
#pragma omp barrier
      }
      if (c.d_x) finish(pointer<Element>(c.d_x), sums, c.units * c.model);
    });
  }

 private:
  index panel_size() const {
    return WIDEST * std::max(output, halves * hidden) * TILE;
  }

  void clear_all() const {
    if (c.d_x) clear(sums, c.units * c.model * sizeof(float));
    if (c.d_weight) clear(pointer<float>(c.d_weight), c.rows * sizeof(float));
    const index bias1 = halves * c.hidden * sizeof(Element), bias2 = c.output * sizeof(Element);
    for (index slot = 0; slot < c.slots; ++slot) {
      if (plan.is_used[slot]) continue;
      if (c.d_w1) clear(pointer<char>(c.d_w1) + slot * bias1 * c.model, bias1 * c.model);
      if (c.d_b1) clear(pointer<char>(c.d_b1) + slot * bias1, bias1);
      if (c.d_w2) clear(pointer<char>(c.d_w2) + slot * bias2 * c.hidden, bias2 * c.hidden);
      if (c.d_b2) clear(pointer<char>(c.d_b2) + slot * bias2, bias2);
    }
#pragma omp barrier
  }

  const float* weight() const { return pointer<float>(c.weight); }
  const index* unit() const { return pointer<index>(c.unit); }

  // dy as a left operand; and dy . b2, the bias' part of the weight's gradient.
  void pack_dy_rows(const Wave& wave) const {
    if (!needs_hidden) return;
#pragma omp for schedule(dynamic) nowait
    for (index b = 0; b < (index)wave.rows.size(); ++b) {
      const RowBlock& rows = wave.rows[b];
      pack_rows(dy_left + b * output * TILE, pointer<Element>(c.grad), c.output, unit() + rows.start, rows.count);
      if (!c.d_weight || !c.b2) continue;
      const Element* bias = pointer<Element>(c.b2) + wave.segments[rows.segment].slot * c.output;
      for (index row = rows.start; row < rows.start + rows.count; ++row) {
        const Element* dy = pointer<Element>(c.grad) + unit()[row] * c.output;
        Vector sum = _mm512_setzero_ps();
        for (index i = 0; i < c.output; i += 16)
          sum = _mm512_fmadd_ps(load_row(dy + i, c.output - i), load_row(bias + i, c.output - i), sum);
        pointer<float>(c.d_weight)[row] = _mm512_reduce_add_ps(sum);
      }
    }
  }

  // dy and x as operands whose k are the rows; and the gradient of b2. One task per segment and columns.
  void pack_columns_of_rows(const Wave& wave) const {
    const index of_dy = c.d_w2 || c.d_b2 ? output : 0, of_x = c.d_w1 ? model : 0, columns = of_dy + of_x;
#pragma omp for schedule(dynamic)
    for (index task = 0; task < (index)wave.segments.size() * columns; ++task) {
      const Segment& segment = wave.segments[task / columns];
      const index number = task % columns, column = number < of_dy ? number : number - of_dy;
      for (index j = 0; j < segment.blocks; ++j) {
        const RowBlock& rows = wave.rows[segment.first_block + j];
        if (number >= of_dy) {
          const Rows source(pointer<Element>(c.x), c.model, unit() + rows.start, rows.count);
          pack_right(x_right + (segment.first_block * model + column * segment.blocks + j) * TILE, source.at,
                     column * BLOCK, c.model - column * BLOCK);
        } else if (c.d_w2) {
          const Rows source(pointer<Element>(c.grad), c.output, unit() + rows.start, rows.count);
          pack_left_transposed(dy_transposed + (segment.first_block * output + column * segment.blocks + j) * TILE,
                               source.at, column * BLOCK, c.output - column * BLOCK);
        }
      }
      if (number < of_dy && c.d_b2) bias2_gradient(segment, column * BLOCK);
    }
  }

  void bias2_gradient(const Segment& segment, index first) const {
    Element* target = pointer<Element>(c.d_b2) + segment.slot * c.output + first;
    const index width = least(BLOCK, c.output - first);
    for (index i = 0; i < width; i += 16) {
      Vector sum = segment.again ? load_row(target + i, width - i) : _mm512_setzero_ps();
      for (index row = segment.start; row < segment.start + segment.count; ++row) {
        const Element* dy = pointer<Element>(c.grad) + unit()[row] * c.output + first + i;
        const Vector factor = _mm512_set1_ps(weight() ? weight()[row] : 1.0f);
        sum = _mm512_fmadd_ps(factor, load_row(dy, width - i), sum);
      }
      store_row(target + i, sum, width - i);
    }
  }

  // g, and all that follows from it elementwise. One task per segment and hidden columns.
  void hidden_gradient(const Wave& wave, const Multiplier& multiply, Element* panel) const {
    const index width = task_width(hidden, c.threads), groups = (hidden + width - 1) / width;
#pragma omp for schedule(dynamic)
    for (index task = 0; task < (index)wave.segments.size() * groups; ++task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * width, number = least(width, hidden - first);
      alignas(64) float d_bias[WIDEST][2][BLOCK] = {};
      pack_columns_of_k(panel, output, pointer<Element>(c.w2) + segment.slot * c.output * c.hidden, c.hidden,
                        c.output, first, number);
      for (index j = 0; j < segment.blocks; ++j)
        for (index i = 0; i < number; ++i)
          hidden_block(wave, segment, j, first + i, multiply, panel + i * output * TILE, d_bias[i],
                       Ahead(dy_left + (segment.first_block + j + 1) * output * TILE, output, i, number));
      for (index i = 0; c.d_b1 && i < number; ++i) store_bias1(segment, (first + i) * BLOCK, d_bias[i]);
    }
  }

  void store_bias1(const Segment& segment, index first, const float (&d_bias)[2][BLOCK]) const {
    const index width = least(BLOCK, c.hidden - first);
    for (index half = 0; half < halves; ++half) {
      Element* target = pointer<Element>(c.d_b1) + (segment.slot * halves + half) * c.hidden + first;
      for (index i = 0; i < width; i += 16) {
        Vector sum = _mm512_load_ps(d_bias[half] + i);
        if (segment.again) sum = _mm512_add_ps(sum, load_row(target + i, width - i));
        store_row(target + i, sum, width - i);
      }
    }
  }

  void hidden_block(const Wave& wave, const Segment& segment, index j, index column, const Multiplier& multiply,
                    const Element* panel, float (&d_bias)[2][BLOCK], Ahead ahead) const {
    alignas(64) float grad[TILE], value[TILE], pre[2][TILE];
    const index b = segment.first_block + j, first = column * BLOCK, width = least(BLOCK, c.hidden - first);
    const RowBlock& rows = wave.rows[b];
    multiply(dy_left + b * output * TILE, panel, output, grad, rows.count, ahead);
    for (index half = 0; half < halves; ++half) {
      const Element* source = pointer<Element>(c.pre) + (rows.start * halves + half) * c.hidden + first;
      for (index r = 0; r < rows.count; ++r, source += halves * c.hidden)
        for (index i = 0; i < BLOCK; i += 16)
          _mm512_store_ps(pre[half] + r * BLOCK + i, load_row(source + i, width - i));
    }
    HIDDEN_BACKWARD[c.activation](pre[0], c.gated ? pre[1] : nullptr, grad, value, rows.count * BLOCK);
    if (c.d_weight)
      for (index r = 0; r < rows.count; ++r) {
        const Vector low = _mm512_mul_ps(_mm512_load_ps(grad + r * BLOCK), _mm512_load_ps(value + r * BLOCK));
        const Vector both = _mm512_fmadd_ps(_mm512_load_ps(grad + r * BLOCK + 16),
                                            _mm512_load_ps(value + r * BLOCK + 16), low);
        weight_parts[(b * BLOCK + r) * hidden + column] = _mm512_reduce_add_ps(both);
      }
    alignas(64) Element packed[TILE];
    const Rows source(packed, BLOCK, rows.count);
    if (c.d_w2) {
      weigh(packed, value, rows, nullptr);
      pack_right(hidden_right + (segment.first_block * hidden + column * segment.blocks + j) * TILE, source.at, 0,
                 BLOCK);
    }
    if (!c.d_x && !c.d_w1 && !c.d_b1) return;
    for (index half = 0; half < halves; ++half) {
      weigh(packed, pre[half], rows, d_bias[half]);
      const index place = half * hidden + column;
      if (c.d_x) pack_left(d_pre_left + (b * halves * hidden + place) * TILE, source.at, 0, BLOCK);
      if (c.d_w1)
        pack_left_transposed(
            d_pre_transposed + (segment.first_block * halves * hidden + place * segment.blocks + j) * TILE,
            source.at, 0, BLOCK);
    }
  }

  // packed = weight of row * values; their sum over rows is added to `total`, if given.
  void weigh(Element* packed, const float* values, const RowBlock& rows, float* total) const {
    for (index i = 0; i < BLOCK; i += 16) {
      Vector sum = total ? _mm512_load_ps(total + i) : _mm512_setzero_ps();
      for (index r = 0; r < rows.count; ++r) {
        const Vector factor = _mm512_set1_ps(weight() ? weight()[rows.start + r] : 1.0f);
        const Vector value = _mm512_mul_ps(factor, _mm512_load_ps(values + r * BLOCK + i));
        sum = _mm512_add_ps(sum, value);
        store_row(packed + r * BLOCK + i, value, 16);
      }
      if (total) _mm512_store_ps(total + i, sum);
    }
  }

  void sum_weight_parts(const Wave& wave) const {
#pragma omp for schedule(static) nowait
    for (index b = 0; b < (index)wave.rows.size(); ++b)
      for (index r = 0; r < wave.rows[b].count; ++r) {
        float sum = 0;
        for (index i = 0; i < hidden; ++i) sum += weight_parts[(b * BLOCK + r) * hidden + i];
        pointer<float>(c.d_weight)[wave.rows[b].start + r] += sum;
      }
  }

  // A weight gradient (slots, parts, size, columns): the product of two operands whose k are a segment's rows.
  void outer_product(const Wave& wave, const Multiplier& multiply, Element* target, const Element* left,
                     index left_blocks, index size, index parts, const Element* right, index right_blocks,
                     index columns) const {
    constexpr index GROUP = 4;  // row blocks whose left operands stay in the cache over all columns
    alignas(64) float sums[TILE];
    const index all = left_blocks * parts, groups = (all + GROUP - 1) / GROUP;
#pragma omp for schedule(dynamic) nowait
    for (index task = 0; task < (index)wave.segments.size() * groups; ++task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * GROUP;
      const Element* lefts = left + segment.first_block * all * TILE;
      const Element* rights = right + segment.first_block * right_blocks * TILE;
      for (index column = 0; column < right_blocks; ++column)
        for (index row = first; row < least(first + GROUP, all); ++row) {
          const index within = row % left_blocks * BLOCK, height = least(BLOCK, size - within);
          multiply(lefts + row * segment.blocks * TILE, rights + column * segment.blocks * TILE, segment.blocks,
                   sums, height,
                   Ahead(rights + (column + 1) * segment.blocks * TILE, segment.blocks, row - first, GROUP));
          Element* place = target + ((segment.slot * parts + row / left_blocks) * size + within) * columns;
          store_block(place + column * BLOCK, columns, height, columns - column * BLOCK, sums, segment.again);
        }
    }
  }

  static void store_block(Element* target, index stride, index height, index width, const float* sums, bool add) {
    for (index r = 0; r < height; ++r, target += stride, sums += BLOCK)
      for (index i = 0; i < BLOCK; i += 16) {
        Vector value = _mm512_load_ps(sums + i);
        if (add) value = _mm512_add_ps(value, load_row(target + i, width - i));
        store_row(target + i, value, width - i);
      }
  }

  // A task owns columns of d x, as in the forward pass.
  void input_gradient(const Wave& wave, const Multiplier& multiply, Element* panel) const {
    alignas(64) float block[TILE];
    const index width = task_width(model, c.threads), depth = halves * hidden;
#pragma omp for schedule(dynamic) nowait
    for (index first = 0; first < model; first += width) {
      const index number = least(width, model - first);
      for (const Segment& segment : wave.segments) {
        for (index half = 0; half < halves; ++half)
          pack_columns_of_k(panel + half * hidden * TILE, depth,
                            pointer<Element>(c.w1) + (segment.slot * halves + half) * c.hidden * c.model,
                            c.model, c.hidden, first, number);
        for (index b = segment.first_block; b < segment.first_block + segment.blocks; ++b)
          for (index i = 0; i < number; ++i) {
            const index at = (first + i) * BLOCK;
            multiply(d_pre_left + b * depth * TILE, panel + i * depth * TILE, depth, block, wave.rows[b].count,
                     Ahead(d_pre_left + (b + 1) * depth * TILE, depth, i, number));
            scatter_block(sums + at, c.model, c.model - at, block, wave.rows[b], unit(), nullptr,
                          nullptr);
          }
      }
    }
  }

  const BackwardCall& c;
  const Plan& plan;
  const index halves, model, hidden, output;  // the sizes in blocks
  const bool needs_hidden;
  Element *dy_left, *dy_transposed, *x_right, *d_pre_left, *d_pre_transposed, *hidden_right, *panels;
  float *weight_parts, *sums;  // sums of d x: d x itself in fp32
};

inline index backward(const BackwardCall& call) {
  const Plan plan(call.units, call.rows, call.experts, call.slots, pointer<index>(call.unit),
                  pointer<index>(call.counts), pointer<index>(call.slot));
  if (plan.status != DONE) return plan.status;
  Backward pass(call, plan);
  Scratch scratch(pass.place(nullptr));
  if (!scratch) return NO_MEMORY;
  pass.place(&scratch);
  pass.run();
  return DONE;
}

}  // namespace
