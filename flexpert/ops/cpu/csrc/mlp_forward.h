// y[unit] += weight * (w2 act(w1 x[unit] + b1) + b2), by waves of experts; without outputs the hidden layer alone.
#pragma once
#include "mlp_common.h"
#include "stream.h"

namespace {

struct ForwardCall {  // in the order of `FORWARD` in backend.py
  index units, rows, model, hidden, output, experts, slots, gated, activation, threads, amx, packed;
  index x, unit, weight, counts, slot, w1, b1, w2, b2, pre, y_rows, y;
};

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

class Forward {
 public:
  Forward(const ForwardCall& call, const Plan& plan)
      : c(call), plan(plan), halves(call.gated ? 2 : 1), model(blocks(c.model)), hidden(blocks(c.hidden)),
        output(blocks(c.output)) {}

  // The size of all buffers; with memory given, their places as well.
  size_t place(Scratch* memory) {
    const index row = (model + hidden) * TILE, alone = plan.most_alone * row + panel_size();
    if (memory) {
      together = memory->take<Element>(plan.most_shared * row);
      own = memory->take<Element>(c.threads * alone);
    }
    return Scratch::size<Element>(plan.most_shared * row) + Scratch::size<Element>(c.threads * alone);
  }

  void run() {
    on_threads(c.threads, [&] {
      const Multiplier multiply(c.amx);
      Element* panel = own + omp_get_thread_num() * (plan.most_alone * (model + hidden) * TILE + panel_size());
      if (c.pre) clear_idle();
      for (const Wave& wave : plan.shared) compute(wave, {true, together, plan.most_shared, panel}, multiply);
#pragma omp for schedule(dynamic)
      for (index i = 0; i < (index)plan.alone.size(); ++i)
        compute(plan.alone[i], {false, panel + panel_size(), plan.most_alone, panel}, multiply);
      if (c.output)
        combine(plan, pointer<Element>(c.y_rows), pointer<float>(c.weight), pointer<Element>(c.y), c.units, c.output);
    });
  }

 private:
  struct Desk {  // where a wave is computed
    bool is_shared;
    Element* packed;
    index blocks;
    Element* panel;
  };

  index panel_size() const { return WIDEST * std::max(model * halves, hidden) * TILE; }

  // Whether tasks ask for weights ahead: one thread's own experts do, and all threads together where rows are so few
  // that weights take longer to arrive than to be multiplied. Others ask for packed rows.
  static bool asks_for_weights(const Wave& wave, bool is_shared) {
    constexpr size_t FEW_BLOCKS = 4;
    return !is_shared || wave.rows.size() <= FEW_BLOCKS;
  }

  // Column blocks of a task: where it asks for weights so few that the next ones find room beside them in the
  // second-level cache, where products are that fast.
  index width_of(const Wave& wave, index column_blocks, index depth, index parts, bool is_shared) const {
    constexpr index NEAR_TILES = 64;
    const index widest = task_width(column_blocks, depth, is_shared ? c.threads : 1);
    if (!Multiplier::HAS_TILES || !asks_for_weights(wave, is_shared)) return widest;
    return least(std::max<index>(1, NEAR_TILES / (parts * depth)), widest);
  }

  void clear_idle() const {
    const index size = halves * c.hidden * sizeof(Element);
    for (const RowBlock& rows : plan.idle) clear(pointer<char>(c.pre) + rows.start * size, rows.count * size);
  }

  void compute(const Wave& wave, const Desk& desk, const Multiplier& multiply) const {
    Element *packed_x = desk.packed, *packed_hidden = desk.packed + desk.blocks * model * TILE;
    each(desk.is_shared, wave.rows.size(), [&](index b) {
      if (is_streamed(wave.segments[wave.rows[b].segment])) return;
      pack_rows(packed_x + b * model * TILE, pointer<Element>(c.x), c.model,
                pointer<index>(c.unit) + wave.rows[b].start, wave.rows[b].count);
    });
    first_product(wave, desk, packed_x, packed_hidden, multiply);
    if (c.output) second_product(wave, desk, packed_hidden, multiply);
  }

  // Weights as they are stored; or, where they are packed, the right operands of column blocks from `column` on.
  const Element* first_weights(index slot) const {
    return pointer<Element>(c.w1) + slot * halves * c.hidden * c.model;
  }
  const Element* second_weights(index slot) const { return pointer<Element>(c.w2) + slot * c.output * c.hidden; }
  const Element* first_panels(index slot, index column) const {
    return pointer<Element>(c.w1) + (slot * hidden + column) * halves * model * TILE;
  }
  const Element* second_panels(index slot, index column) const {
    return pointer<Element>(c.w2) + (slot * output + column) * hidden * TILE;
  }

  // The right operands of column blocks first .. first + number, packed into `panel` unless the weights are.
  const Element* pack_first(index slot, index first, index number, Element* panel) const {
    if (c.packed) return first_panels(slot, first);
    for (index i = 0; i < number * halves; ++i)
      pack_columns(panel + i * model * TILE, first_weights(slot) + i % halves * c.hidden * c.model, c.hidden, c.model,
                   (first + i / halves) * BLOCK);
    return panel;
  }
  const Element* pack_second(index slot, index first, index number, Element* panel) const {
    if (c.packed) return second_panels(slot, first);
    for (index i = 0; i < number; ++i)
      pack_columns(panel + i * hidden * TILE, second_weights(slot), c.output, c.hidden, (first + i) * BLOCK);
    return panel;
  }

  // What these read.
  Area first_area(index slot, index first, index number) const {
    number = least(number, hidden - first);
    if (c.packed) return packed_panels(first_panels(slot, first), number * halves * model);
    return columns_of(first_weights(slot), halves, c.hidden, c.model, first, number);
  }
  Area second_area(index slot, index first, index number) const {
    number = least(number, output - first);
    if (c.packed) return packed_panels(second_panels(slot, first), number * hidden);
    return columns_of(second_weights(slot), 1, c.output, c.hidden, first, number);
  }

  static bool is_streamed(const Segment& segment) { return segment.count <= STREAM_ROWS; }

  // The hidden layer of few rows, column blocks first .. first + number; its rows lie one after the other.
  void stream_first(const Segment& segment, const RowBlock& rows, index first, index number, Element* target,
                    Element* panel, const Multiplier& multiply) const {
    alignas(64) float sums[2][TILE];
    const Rows x(pointer<Element>(c.x), c.model, pointer<index>(c.unit) + rows.start, rows.count);
    const Stream stream(multiply, x, rows.count, c.model, panel, c.packed);
    for (index column = first; column < first + number; ++column) {
      const index at = column * BLOCK;
      for (index half = 0; half < halves; ++half)
        stream.block(c.packed ? first_panels(segment.slot, column) + half * model * TILE
                              : first_weights(segment.slot) + (half * c.hidden + at) * c.model,
                     c.hidden - at, sums[half]);
      HiddenRows block = hidden_rows(rows, segment.slot, column, target + at);
      block.tile_stride = hidden * BLOCK;
      for (index r = 0; r < rows.count; ++r) block.step(r, sums);
    }
  }

  void stream_second(const Segment& segment, const RowBlock& rows, index first, index number,
                     const Element* source, Element* panel, const Multiplier& multiply) const {
    alignas(64) float sums[1][TILE];
    const Rows h(source, hidden * BLOCK, rows.count);
    const Stream stream(multiply, h, rows.count, c.hidden, panel, c.packed);
    for (index column = first; column < first + number; ++column) {
      const index at = column * BLOCK;
      stream.block(c.packed ? second_panels(segment.slot, column) : second_weights(segment.slot) + at * c.hidden,
                   c.output - at, sums[0]);
      const StoreRows block = output_rows(rows, segment.slot, column);
      for (index r = 0; r < rows.count; ++r) block.step(r, sums);
    }
  }

  StoreRows output_rows(const RowBlock& rows, index slot, index column) const {
    const index at = column * BLOCK;
    return {rows.count, pointer<Element>(c.y_rows) + rows.start * c.output + at, c.output, c.output - at,
            c.b2 ? pointer<Element>(c.b2) + slot * c.output + at : nullptr};
  }

  // One task: some column blocks of the hidden layer for all rows of a segment.
  void first_product(const Wave& wave, const Desk& desk, const Element* packed_x, Element* packed_hidden,
                     const Multiplier& multiply) const {
    const index width = width_of(wave, hidden, model, halves, desk.is_shared), groups = (hidden + width - 1) / width;
    const bool asks_for_weights = this->asks_for_weights(wave, desk.is_shared);
    Pipeline<HiddenRows> pipeline(multiply);
    each(desk.is_shared, wave.segments.size() * groups, [&](index task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * width, number = least(width, hidden - first);
      if (is_streamed(segment))
        return stream_first(segment, wave.rows[segment.first_block], first, number,
                            packed_hidden + segment.first_block * hidden * TILE, desk.panel, multiply);
      const Element* panels = pack_first(segment.slot, first, number, desk.panel);
      // Threads that share a wave take turns. At the end: the second weights.
      const index next = first + number * (desk.is_shared ? c.threads : 1);
      const Area soon = next < hidden
                            ? first_area(segment.slot, next, width)
                            : second_area(segment.slot, 0, width_of(wave, output, hidden, 1, desk.is_shared));
      for (index j = 0; j < segment.blocks; ++j) {
        const index b = segment.first_block + j, rows = wave.rows[b].count;
        Operands<Element> operands = {packed_x + b * model * TILE, panels, model * TILE, halves, c.model};
        operands.next_left = operands.left + model * TILE;
        operands.next_right = panels;
        const Area area = asks_for_weights ? soon : packed_rows(packed_x, b + 1, model);
        const index part = asks_for_weights ? j : 0, parts = asks_for_weights ? segment.blocks : 1;
        const auto epilogue = [&](index i) {
          return hidden_rows(wave.rows[b], segment.slot, first + i, packed_hidden + (b * hidden + first + i) * TILE);
        };
        if (!c.gated) {
          pipeline.products(operands, number, rows, area, part, parts, epilogue);
          continue;
        }
        const Operands<Element> next = operands;
        for (index i = 0; i < number; ++i, operands.right += 2 * model * TILE) {
          const bool ends = i + 1 == number;
          operands.next_left = ends ? next.next_left : operands.left;
          operands.next_right = ends ? panels : operands.right + 2 * model * TILE;
          pipeline.product(operands, rows, Ahead(area, part * number + i, parts * number, 2 * model), epilogue(i));
        }
      }
      pipeline.drain();
    });
  }

  HiddenRows hidden_rows(const RowBlock& rows, index slot, index column, Element* tile) const {
    const index first = column * BLOCK;
    HiddenRows result;
    result.steps = EVEN ? rows.count : BLOCK;
    result.count = rows.count;
    result.width = c.hidden - first;
    result.stride = c.hidden;
    result.halves = halves;
    result.row = HIDDEN_ROW[c.activation];
    if (c.b1) result.bias = pointer<Element>(c.b1) + slot * halves * c.hidden + first;
    if (c.pre) result.pre = pointer<Element>(c.pre) + rows.start * halves * c.hidden + first;
    result.tile = tile;
    return result;
  }

  // One task: some column blocks of the output for all rows of a segment.
  void second_product(const Wave& wave, const Desk& desk, const Element* packed_hidden,
                      const Multiplier& multiply) const {
    const index width = width_of(wave, output, hidden, 1, desk.is_shared), groups = (output + width - 1) / width;
    const bool asks_for_weights = this->asks_for_weights(wave, desk.is_shared);
    Pipeline<StoreRows> pipeline(multiply);
    each(desk.is_shared, wave.segments.size() * groups, [&](index task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * width, number = least(width, output - first);
      if (is_streamed(segment))
        return stream_second(segment, wave.rows[segment.first_block], first, number,
                             packed_hidden + segment.first_block * hidden * TILE, desk.panel, multiply);
      const Element* panels = pack_second(segment.slot, first, number, desk.panel);
      const Area soon = second_area(segment.slot, first + number * (desk.is_shared ? c.threads : 1), width);
      for (index j = 0; j < segment.blocks; ++j) {
        const index b = segment.first_block + j;
        const RowBlock& rows = wave.rows[b];
        Operands<Element> operands = {packed_hidden + b * hidden * TILE, panels, hidden * TILE, 1, c.hidden};
        operands.next_left = operands.left + hidden * TILE;
        operands.next_right = panels;
        pipeline.products(operands, number, rows.count,
                          asks_for_weights ? soon : packed_rows(packed_hidden, b + 1, hidden),
                          asks_for_weights ? j : 0, asks_for_weights ? segment.blocks : 1,
                          [&](index i) { return output_rows(rows, segment.slot, first + i); });
      }
      pipeline.drain();
    });
  }

  const ForwardCall& c;
  const Plan& plan;
  const index halves, model, hidden, output;  // the sizes in blocks
  Element *together = nullptr, *own = nullptr;
};

inline index forward(const ForwardCall& call) { return run_pass<Forward>(call); }

}  // namespace
