// y[unit] += weight * (w2 act(w1 x[unit] + b1) + b2), by waves of experts.
#pragma once
#include "mlp_common.h"

namespace {

struct ForwardCall {  // in the order of `FORWARD` in backend.py
  index units, rows, model, hidden, output, experts, slots, gated, activation, threads, amx;
  index x, unit, weight, counts, slot, w1, b1, w2, b2, pre, y;
};

class Forward {
 public:
  Forward(const ForwardCall& call, const Plan& plan, Scratch& scratch)
      : c(call), plan(plan), halves(call.gated ? 2 : 1) {
    packed_x = scratch.take<Element>(plan.most_blocks * blocks(c.model) * TILE);
    packed_hidden = scratch.take<Element>(plan.most_blocks * blocks(c.hidden) * TILE);
    panels = scratch.take<Element>(c.threads * panel_size(c));
    sums = sizeof(Element) == 4 ? pointer<float>(c.y) : scratch.take<float>(c.units * c.output);
    prefer_huge_pages(c.pre, c.rows * halves * c.hidden * sizeof(Element));
    prefer_huge_pages(c.y, c.units * c.output * sizeof(Element));
  }

  static size_t bytes(const ForwardCall& c, const Plan& plan) {
    return Scratch::size<Element>(plan.most_blocks * blocks(c.model) * TILE) +
           Scratch::size<Element>(plan.most_blocks * blocks(c.hidden) * TILE) +
           Scratch::size<Element>(c.threads * panel_size(c)) +
           (sizeof(Element) == 4 ? 0 : Scratch::size<float>(c.units * c.output));
  }

  void run() {
    on_threads(c.threads, [&] {
      const Multiplier multiply(c.amx);
      Element* panel = panels + omp_get_thread_num() * panel_size(c);
      clear(sums, c.units * c.output * sizeof(float));
      if (c.pre) clear_idle();
#pragma omp barrier
      for (const Wave& wave : plan.waves) {
        gather(wave);
        first_product(wave, multiply, panel);
        second_product(wave, multiply, panel);
      }
      finish(pointer<Element>(c.y), sums, c.units * c.output);
    });
  }

 private:
  static index panel_size(const ForwardCall& c) {
    const index model = blocks(c.model), hidden = blocks(c.hidden);
    return WIDEST * std::max(model * (c.gated ? 2 : 1), hidden) * TILE;
  }

  void clear_idle() const {
    const index size = halves * c.hidden * sizeof(Element);
    for (const RowBlock& rows : plan.idle) clear(pointer<char>(c.pre) + rows.start * size, rows.count * size);
  }

  void gather(const Wave& wave) const {
#pragma omp for schedule(dynamic)
    for (index b = 0; b < (index)wave.rows.size(); ++b)
      pack_rows(packed_x + b * blocks(c.model) * TILE, pointer<Element>(c.x), c.model,
                pointer<index>(c.unit) + wave.rows[b].start, wave.rows[b].count);
  }

  void first_product(const Wave& wave, const Multiplier& multiply, Element* panel) const {
    const index columns = blocks(c.hidden), depth = blocks(c.model), width = task_width(columns, c.threads);
    const index groups = (columns + width - 1) / width;
#pragma omp for schedule(dynamic)
    for (index task = 0; task < (index)wave.segments.size() * groups; ++task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * width, number = least(width, columns - first);
      for (index i = 0; i < number * halves; ++i)
        pack_columns(panel + i * depth * TILE,
                     pointer<Element>(c.w1) + (segment.slot * halves + i % halves) * c.hidden * c.model,
                     c.hidden, c.model, (first + i / halves) * BLOCK);
      for (index b = segment.first_block; b < segment.first_block + segment.blocks; ++b)
        for (index i = 0; i < number; ++i)
          hidden_block(wave.rows[b], segment.slot, b, first + i, multiply, panel + i * halves * depth * TILE,
                       Ahead(packed_x + (b + 1) * depth * TILE, depth, i, number));
    }
  }

  void hidden_block(const RowBlock& rows, index slot, index b, index column, const Multiplier& multiply,
                    const Element* panel, Ahead ahead) const {
    alignas(64) float values[2][TILE];
    alignas(64) Element narrow_rows[TILE];
    const index depth = blocks(c.model), first = column * BLOCK, width = least(BLOCK, c.hidden - first);
    for (index half = 0; half < halves; ++half) {
      multiply(packed_x + b * depth * TILE, panel + half * depth * TILE, depth, values[half], rows.count,
               half ? Ahead() : ahead);
      const index at = half * c.hidden + first;
      if (c.b1) add_bias(values[half], pointer<Element>(c.b1) + slot * halves * c.hidden + at, width, rows.count);
      if (c.pre) {
        Element* pre = pointer<Element>(c.pre) + rows.start * halves * c.hidden + at;
        for (index r = 0; r < rows.count; ++r, pre += halves * c.hidden)
          for (index i = 0; i < width; i += 16)
            store_row(pre + i, _mm512_loadu_ps(values[half] + r * BLOCK + i), width - i);
      }
    }
    HIDDEN_FORWARD[c.activation](values[0], c.gated ? values[1] : nullptr, rows.count * BLOCK);
    for (index i = 0; i < rows.count * BLOCK; i += 16)
      store_row(narrow_rows + i, _mm512_loadu_ps(values[0] + i), 16);
    const Rows source(narrow_rows, BLOCK, rows.count);
    pack_left(packed_hidden + (b * blocks(c.hidden) + column) * TILE, source.at, 0, BLOCK);
  }

  static void add_bias(float* sums, const Element* bias, index width, index count) {
    for (index i = 0; i < width; i += 16) {
      const Vector shift = load_row(bias + i, width - i);
      for (float* place = sums + i; place < sums + count * BLOCK; place += BLOCK)
        _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), shift));
    }
  }

  // A task owns columns of y, for all rows and in their order: no two threads add to one element, and the
  // result does not depend on their number.
  void second_product(const Wave& wave, const Multiplier& multiply, Element* panel) const {
    alignas(64) float block[TILE];
    const index columns = blocks(c.output), depth = blocks(c.hidden), width = task_width(columns, c.threads);
#pragma omp for schedule(dynamic)
    for (index first = 0; first < columns; first += width) {
      const index number = least(width, columns - first);
      for (const Segment& segment : wave.segments) {
        for (index i = 0; i < number; ++i)
          pack_columns(panel + i * depth * TILE,
                       pointer<Element>(c.w2) + segment.slot * c.output * c.hidden, c.output, c.hidden,
                       (first + i) * BLOCK);
        for (index b = segment.first_block; b < segment.first_block + segment.blocks; ++b)
          for (index i = 0; i < number; ++i) {
            const index at = (first + i) * BLOCK;
            multiply(packed_hidden + b * depth * TILE, panel + i * depth * TILE, depth, block,
                     wave.rows[b].count, Ahead(packed_hidden + (b + 1) * depth * TILE, depth, i, number));
            scatter_block(sums + at, c.output, c.output - at, block, wave.rows[b],
                          pointer<index>(c.unit), pointer<float>(c.weight),
                          c.b2 ? pointer<Element>(c.b2) + segment.slot * c.output + at : nullptr);
          }
      }
    }
  }

  const ForwardCall& c;
  const Plan& plan;
  const index halves;
  Element *packed_x, *packed_hidden, *panels;
  float* sums;  // of y: y itself in fp32
};

inline index forward(const ForwardCall& call) {
  const Plan plan(call.units, call.rows, call.experts, call.slots, pointer<index>(call.unit),
                  pointer<index>(call.counts), pointer<index>(call.slot));
  if (plan.status != DONE) return plan.status;
  Scratch scratch(Forward::bytes(call, plan));
  if (!scratch) return NO_MEMORY;
  Forward(call, plan, scratch).run();
  return DONE;
}

}  // namespace
