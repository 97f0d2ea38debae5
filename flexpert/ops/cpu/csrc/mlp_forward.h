// y[unit] += weight * (w2 act(w1 x[unit] + b1) + b2), by waves of experts; without outputs the hidden layer alone.
#pragma once
#include "few_rows.h"
#include "stages.h"
#include "strips.h"

namespace {

class Forward {
 public:
  Forward(const ForwardCall& call, const Plan& plan)
      : c(call), plan(plan), few_rows(c, plan.few), halves(call.gated ? 2 : 1), model(blocks(c.model)),
        hidden(blocks(c.hidden)), output(blocks(c.output)), looks_ahead(plan.most_shared <= MOST_AHEAD),
        stages(STAGES * plan.shared.size()) {}

  // The size of all buffers; with memory given, their places as well.
  size_t place(Scratch* memory) {
    const index alone = plan.most_alone * (model + hidden) * TILE + panel_size();
    const index shared = plan.most_shared * (inputs_at_once() * model + hidden_at_once() * hidden) * TILE;
    const index results = c.y_rows ? 0 : c.rows * c.output;
    if (memory) {
      together = memory->take<Element>(shared);
      own = memory->take<Element>(c.threads * alone);
      if (!c.y_rows) c.y_rows = reinterpret_cast<index>(memory->take<Element>(results));
    }
    return Scratch::size<Element>(shared) + Scratch::size<Element>(c.threads * alone) +
           Scratch::size<Element>(results) + few_rows.place(memory);
  }

  void run() {
    on_threads(has_waves() ? c.threads : few_rows.threads(), [&] {
      const Multiplier multiply(c.amx);
      Element* panel = own + omp_get_thread_num() * (plan.most_alone * (model + hidden) * TILE + panel_size());
      if (c.pre) clear_idle();
      few_rows.run(multiply);
      compute_shared(panel, multiply);
#pragma omp for schedule(dynamic)
      for (index i = 0; i < (index)plan.alone.size(); ++i) compute_alone(plan.alone[i], panel, multiply);
      if (c.output)
        combine(plan, pointer<Element>(c.y_rows), pointer<float>(c.weight), pointer<Element>(c.y), c.units, c.output);
    });
  }

 private:
  struct Desk {  // where a wave is computed
    bool is_shared;
    index wave;  // number of a shared one
    Element *x, *hidden, *panel;
  };

  // Of each shared wave. The second product follows the first one of the next wave, so that threads that are done with
  // a stage need not wait for the others: what it needs lies two stages back.
  enum Stage : index { PACK, FIRST, SECOND, STAGES };

  static constexpr index MOST_AHEAD = 4 * WAVE_BLOCKS;  // of larger waves the packed rows take too much memory

  index inputs_at_once() const { return looks_ahead ? least(2, plan.shared.size()) : 1; }
  index hidden_at_once() const { return looks_ahead ? least(3, plan.shared.size()) : 1; }

  bool has_waves() const { return plan.shared.size() + plan.alone.size(); }

  index panel_size() const { return has_waves() ? WIDEST * std::max(model * halves, hidden) * TILE : 0; }

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

  Desk shared_desk(index wave, Element* panel) const {
    const index x = plan.most_shared * model * TILE, row = plan.most_shared * hidden * TILE;
    return {true, wave, together + wave % inputs_at_once() * x,
            together + inputs_at_once() * x + wave % hidden_at_once() * row, panel};
  }

  void compute_shared(Element* panel, const Multiplier& multiply) {
    const index number = plan.shared.size();
    if (!looks_ahead || number == 1) {
      for (index i = 0; i < number; ++i) compute(plan.shared[i], shared_desk(i, panel), multiply);
      return;
    }
    const auto pack = [&](index i) {
      if (i < number) pack_inputs(plan.shared[i], shared_desk(i, panel));
    };
    const auto second = [&](index i) {
      if (i >= 0 && c.output) second_product(plan.shared[i], shared_desk(i, panel), multiply);
    };
    pack(0);
    for (index i = 0; i < number; ++i) {
      first_product(plan.shared[i], shared_desk(i, panel), multiply);
      pack(i + 1);
      second(i - 1);
    }
    second(number - 1);
  }

  void compute_alone(const Wave& wave, Element* panel, const Multiplier& multiply) {
    Element* packed = panel + panel_size();
    compute(wave, {false, 0, packed, packed + plan.most_alone * model * TILE, panel}, multiply);
  }

  void compute(const Wave& wave, const Desk& desk, const Multiplier& multiply) {
    pack_inputs(wave, desk);
    if (!desk.is_shared && !c.gated && Strips::fit(wave)) return multiply_strips(wave, desk, multiply);
    first_product(wave, desk, multiply);
    if (c.output) second_product(wave, desk, multiply);
  }

  // Both products of an expert of few rows.
  void multiply_strips(const Wave& wave, const Desk& desk, const Multiplier& multiply) const {
    const index slot = wave.segments[0].slot;
    const ByColumn first = {first_weights(slot), c.hidden, c.model};
    const ByColumn second = {second_weights(slot), c.output, c.hidden};
    Strips strips(multiply, wave);
    for (index column = 0; column < hidden; column += ABREAST)
      strips.product(desk.x, first, column, c.output ? second.piece(0, 0) : Area(), [&](index b, index i) {
        const RowBlock& rows = wave.rows[b];
        return hidden_rows(c, rows.start, rows.count, slot, i, desk.hidden + (b * hidden + i) * TILE);
      });
    for (index column = 0; column < output; column += ABREAST)
      strips.product(desk.hidden, second, column, Area(), [&](index b, index i) {
        return output_rows(c, wave.rows[b].start, wave.rows[b].count, slot, i);
      });
  }

  // All tasks of a stage: those of a shared wave that other threads leave, after the stages of which it needs results
  // or memory.
  template <typename Body>
  void each(const Desk& desk, Stage stage, index count, std::initializer_list<index> needs, const Body& body) {
    if (desk.is_shared) return stages.run(desk.wave * STAGES + stage, count, needs, body);
    for (index i = 0; i < count; ++i) body(i);
  }
  static index stage_of(index wave, Stage stage) { return wave < 0 ? -1 : wave * STAGES + stage; }

  void pack_inputs(const Wave& wave, const Desk& desk) {
    each(desk, PACK, wave.rows.size(), {stage_of(desk.wave - inputs_at_once(), FIRST)}, [&](index b) {
      pack_rows(desk.x + b * model * TILE, pointer<Element>(c.x), c.model, pointer<index>(c.unit) + wave.rows[b].start,
                wave.rows[b].count);
    });
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

  // One task: some column blocks of the hidden layer for all rows of a segment.
  void first_product(const Wave& wave, const Desk& desk, const Multiplier& multiply) {
    const index width = width_of(wave, hidden, model, halves, desk.is_shared), groups = (hidden + width - 1) / width;
    const bool asks_for_weights = this->asks_for_weights(wave, desk.is_shared);
    Pipeline<HiddenRows> pipeline(multiply);
    const index freed = stage_of(desk.wave - hidden_at_once(), c.output ? SECOND : FIRST);
    each(desk, FIRST, wave.segments.size() * groups, {stage_of(desk.wave, PACK), freed}, [&](index task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * width, number = least(width, hidden - first);
      const Element* panels = pack_first(segment.slot, first, number, desk.panel);
      // Threads that share a wave take turns. At the end: the second weights.
      const index next = first + number * (desk.is_shared ? c.threads : 1);
      const Area soon = next < hidden
                            ? first_area(segment.slot, next, width)
                            : second_area(segment.slot, 0, width_of(wave, output, hidden, 1, desk.is_shared));
      for (index j = 0; j < segment.blocks; ++j) {
        const index b = segment.first_block + j, rows = wave.rows[b].count;
        Operands<Element> operands = {desk.x + b * model * TILE, panels, model * TILE, halves, c.model};
        operands.next_left = operands.left + model * TILE;
        operands.next_right = panels;
        const Portion ahead =
            asks_for_weights ? Portion{soon, j, segment.blocks} : Portion{packed_rows(desk.x, b + 1, model)};
        const auto epilogue = [&](index i) {
          return hidden_rows(c, wave.rows[b].start, rows, segment.slot, first + i,
                             desk.hidden + (b * hidden + first + i) * TILE);
        };
        if (!c.gated) {
          pipeline.products(operands, number, rows, ahead, epilogue);
          continue;
        }
        const Operands<Element> next = operands;
        for (index i = 0; i < number; ++i, operands.right += 2 * model * TILE) {
          const bool ends = i + 1 == number;
          operands.next_left = ends ? next.next_left : operands.left;
          operands.next_right = ends ? panels : operands.right + 2 * model * TILE;
          pipeline.product(operands, rows, Ahead(ahead.of(i, number), 2 * model), epilogue(i));
        }
      }
      pipeline.drain();
    });
  }

  // One task: some column blocks of the output for all rows of a segment.
  void second_product(const Wave& wave, const Desk& desk, const Multiplier& multiply) {
    const index width = width_of(wave, output, hidden, 1, desk.is_shared), groups = (output + width - 1) / width;
    const bool asks_for_weights = this->asks_for_weights(wave, desk.is_shared);
    Pipeline<StoreRows> pipeline(multiply);
    each(desk, SECOND, wave.segments.size() * groups, {stage_of(desk.wave, FIRST)}, [&](index task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * width, number = least(width, output - first);
      const Element* panels = pack_second(segment.slot, first, number, desk.panel);
      const Area soon = second_area(segment.slot, first + number * (desk.is_shared ? c.threads : 1), width);
      for (index j = 0; j < segment.blocks; ++j) {
        const index b = segment.first_block + j;
        const RowBlock& rows = wave.rows[b];
        Operands<Element> operands = {desk.hidden + b * hidden * TILE, panels, hidden * TILE, 1, c.hidden};
        operands.next_left = operands.left + hidden * TILE;
        operands.next_right = panels;
        pipeline.products(operands, number, rows.count,
                          asks_for_weights ? Portion{soon, j, segment.blocks}
                                           : Portion{packed_rows(desk.hidden, b + 1, hidden)},
                          [&](index i) { return output_rows(c, rows.start, rows.count, segment.slot, first + i); });
      }
      pipeline.drain();
    });
  }

  ForwardCall c;
  const Plan& plan;
  FewRows few_rows;
  const index halves, model, hidden, output;  // the sizes in blocks
  const bool looks_ahead;
  Stages stages;
  Element *together = nullptr, *own = nullptr;
};

inline index forward(const ForwardCall& call) { return run_pass<Forward>(call, FewRows::most(call)); }

}  // namespace
