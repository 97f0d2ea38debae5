// Gradients of the grouped MLP. With g = w2^T dy[unit], before weighting:
//   d weight = g . hidden + dy . b2        d pre = weight * g * act'(pre)
//   d w2 = sum dy (weight * hidden)^T      d w1 = sum d pre x^T      d x[unit] += w1^T d pre
// so that dy and x are used as they are, and the weight enters in fp32. Gradients not asked for are null.
#pragma once
#include "backward_rows.h"
#include "stages.h"
#include "strips.h"
#include "turns.h"

namespace {

class Backward {
 public:
  Backward(const BackwardCall& call, const Plan& plan)
      : c(call), plan(plan), halves(call.gated ? 2 : 1), model(blocks(c.model)), hidden(blocks(c.hidden)),
        output(blocks(c.output)), needs_hidden(c.d_x || c.d_w1 || c.d_b1 || c.d_weight || c.d_w2),
        desks_at_once(plan.most_shared <= MOST_AHEAD ? least(2, plan.shared.size()) : least(1, plan.shared.size())),
        stages(STAGES * plan.shared.size()), turns(plan.alone.size()) {}

  // The size of all buffers; with memory given, their places as well.
  size_t place(Scratch* memory) {
    desks.resize(c.threads + desks_at_once);
    size_t total = 0;
    for (index i = 0; i < (index)desks.size(); ++i) total += place(desks[i], i >= c.threads, memory);
    return total;
  }

  void run() {
    on_threads(c.threads, [&] {
      const Multiplier multiply(c.amx);
      Turn turn(turns);
      Desk own = desks[omp_get_thread_num()];
      own.turn = &turn;
      clear_all();
      compute_shared(own.panel, multiply);
      for (index i = turn.begin(); i >= 0; i = turn.begin()) compute(plan.alone[i], own, multiply);
#pragma omp barrier
      if (c.d_x)
        combine(plan, pointer<Element>(c.d_rows), nullptr, pointer<Element>(c.d_x), c.units, c.model);
    });
  }

 private:
  // What a stage of a shared wave needs lies at least two stages back, so that threads that are done with one need not
  // wait for the others: rows are packed a wave ahead.
  enum Stage : index { PACK, HIDDEN, SECOND, FIRST, INPUT, WEIGHTS, STAGES };

  struct Span {  // of blocks
    index first, number;
  };

  // A weight gradient (slots, parts, rows, columns), of which some rows and columns are computed, as the product of two
  // operands whose k are a segment's rows.
  struct Outer {
    Stage stage;
    Element* target;
    index parts, rows, columns;
    Span of_rows, of_columns;
    const Element *left, *right;
    Portion soon;  // what is asked for; if that is nothing, the next right operand
  };

  struct Desk {  // where a wave is computed
    bool is_shared;
    index wave;  // number of a shared one
    index span;  // column blocks of the hidden layer that go through all products at a time
    Element *dy_left, *dy_transposed, *x_right, *d_pre_left, *d_pre_transposed, *hidden_right, *panel;
    float *weight_parts, *x_sums;
    Turn* turn = nullptr;  // of a thread that computes its own experts
  };

  // One thread's own experts of few rows go through all products by spans of the hidden layer, so that what is packed
  // is still in the second-level cache when it is used. The price is that sums of the rows' gradients wait in fp32, so
  // only products that are as fast as those of tiles gain.
  index own_span() const {
    constexpr index SPAN = 8, MOST_SUMS = 1 << 19;
    if (!Multiplier::HAS_TILES || !c.amx) return hidden;
    const index sums = plan.most_alone * model * TILE * (index)sizeof(float);
    return c.d_x && sums > MOST_SUMS ? hidden : least(SPAN, hidden);
  }

  size_t place(Desk& desk, bool is_shared, Scratch* memory) const {
    size_t total = 0;
    const index rows = is_shared ? plan.most_shared : plan.most_alone;
    const auto buffer = [&](auto*& target, bool is_needed, index size) {
      using T = std::remove_reference_t<decltype(*target)>;
      target = memory && is_needed ? memory->take<T>(size) : nullptr;
      if (is_needed) total += Scratch::size<T>(size);
    };
    desk.is_shared = is_shared;
    desk.span = is_shared ? hidden : own_span();
    const index span = desk.span, panel = std::max(WIDEST_OF_K * (output + halves * span), WIDEST * halves * hidden);
    buffer(desk.dy_left, needs_hidden, rows * output * TILE);
    buffer(desk.dy_transposed, c.d_w2 && !TURNED, rows * output * TILE);
    buffer(desk.x_right, c.d_w1, rows * model * TILE);
    buffer(desk.d_pre_left, c.d_x || (c.d_w1 && TURNED), rows * halves * span * TILE);
    buffer(desk.d_pre_transposed, c.d_w1 && !TURNED, rows * halves * span * TILE);
    buffer(desk.hidden_right, c.d_w2, rows * span * TILE);
    buffer(desk.weight_parts, c.d_weight, rows * hidden * BLOCK);
    buffer(desk.x_sums, c.d_x && span < hidden, rows * model * TILE);
    buffer(desk.panel, !is_shared, panel * TILE);
    return total;
  }

  static constexpr index MOST_AHEAD = 4 * WAVE_BLOCKS;  // of larger waves the packed rows take too much memory

  Desk shared_desk(index wave, Element* panel) const {
    Desk desk = desks[c.threads + wave % desks_at_once];
    desk.wave = wave, desk.panel = panel;
    return desk;
  }

  bool has(Stage stage) const {
    switch (stage) {
      case HIDDEN: return needs_hidden;
      case SECOND: return c.d_w2;
      case FIRST: return c.d_w1;
      case INPUT: return c.d_x;
      case WEIGHTS: return c.d_weight;
      default: return true;
    }
  }

  // For those that wait for it; -1 where there is none.
  index stage_of(index wave, Stage stage) const { return wave < 0 || !has(stage) ? -1 : wave * STAGES + stage; }

  // All tasks of a stage: those of a shared wave that other threads leave, after the stages of which it needs results
  // or memory, or whose sums it adds to.
  template <typename Body>
  void each(const Desk& desk, Stage stage, index count, const Body& body) {
    if (!desk.is_shared) {
      for (index i = 0; i < count; ++i) body(i);
      return;
    }
    const index own = desk.wave, last = own - 1, before = own - desks_at_once;
    const auto run = [&](std::initializer_list<index> needs) { stages.run(own * STAGES + stage, count, needs, body); };
    const index packed = stage_of(own, PACK), computed = stage_of(own, HIDDEN);
    const index second = stage_of(before, SECOND), first = stage_of(before, FIRST);
    switch (stage) {
      case PACK: return run({stage_of(last, PACK), stage_of(before, HIDDEN), second, first});
      case HIDDEN:
        return run({packed, stage_of(last, HIDDEN), second, first, stage_of(before, INPUT), stage_of(before, WEIGHTS)});
      default: return run({packed, computed, stage_of(last, stage)});
    }
  }

  void compute_shared(Element* panel, const Multiplier& multiply) {
    const index number = plan.shared.size();
    if (number) pack_wave(plan.shared[0], shared_desk(0, panel));
    for (index i = 0; i < number; ++i) {
      const auto pack_next = [&] {
        if (i + 1 < number) pack_wave(plan.shared[i + 1], shared_desk(i + 1, panel));
      };
      products(plan.shared[i], shared_desk(i, panel), multiply, [&] { if (desks_at_once == 2) pack_next(); });
      if (desks_at_once == 1) pack_next();
    }
  }

  void compute(const Wave& wave, const Desk& desk, const Multiplier& multiply) {
    pack_wave(wave, desk);
    products(wave, desk, multiply, [] {});
  }

  // All of a wave whose rows are packed, and `other` work between the stage that all others need and those.
  template <typename Other>
  void products(const Wave& wave, const Desk& desk, const Multiplier& multiply, const Other& other) {
    const bool in_strips = !desk.is_shared && !c.gated && Strips::fit(wave);
    for (index first = 0; needs_hidden && first < hidden; first += desk.span) {
      const Span span = {first, least(desk.span, hidden - first)};
      const Area w1 = first_weights(wave.segments[0], desk, span);
      if (in_strips)
        hidden_strips(wave, desk, span, multiply);
      else
        hidden_gradient(wave, desk, span, multiply, {w1, 0, c.d_w2 ? 2 : 1});
      if (first == 0) other();
      if (c.d_w2)
        outer_product(wave, desk, multiply,
                      {SECOND, pointer<Element>(c.d_w2), 1, c.output, c.hidden, {0, output}, span,
                       TURNED ? desk.dy_left : desk.dy_transposed, desk.hidden_right, {w1, 1, 2}});
      const Area w2 = next_second_weights(wave.segments[0], desk, span);
      if (c.d_w1)
        outer_product(wave, desk, multiply,
                      {FIRST, pointer<Element>(c.d_w1), halves, c.hidden, c.model, span, {0, model},
                       TURNED ? desk.d_pre_left : desk.d_pre_transposed, desk.x_right,
                       {w2, 0, c.d_x ? 2 : 1}});
      if (c.d_x && in_strips)
        input_strips(wave, desk, span, multiply);
      else if (c.d_x)
        input_gradient(wave, desk, span, multiply, {w2, c.d_w1 ? 1 : 0, c.d_w1 ? 2 : 1});
    }
    if (!needs_hidden) other();
    if (c.d_weight) sum_weight_parts(wave, desk);
  }

  void clear_all() const {
    if (c.d_weight) clear(pointer<float>(c.d_weight), c.rows * sizeof(float));
    const index bias1 = halves * c.hidden * sizeof(Element), bias2 = c.output * sizeof(Element);
    const auto is_used = [&](index slot) { return plan.is_used[slot] != 0; };
    if (c.d_w1) clear(pointer<char>(c.d_w1), bias1 * c.model, c.slots, is_used);
    if (c.d_b1) clear(pointer<char>(c.d_b1), bias1, c.slots, is_used);
    if (c.d_w2) clear(pointer<char>(c.d_w2), bias2 * c.hidden, c.slots, is_used);
    if (c.d_b2) clear(pointer<char>(c.d_b2), bias2, c.slots, is_used);
#pragma omp barrier
  }

  const float* weight() const { return pointer<float>(c.weight); }
  const index* unit() const { return pointer<index>(c.unit); }

  // One task: a block of rows, or the gradient of b2 for a segment and a block of columns.
  void pack_wave(const Wave& wave, const Desk& desk) {
    const index columns = c.d_b2 ? output : 0, all = wave.rows.size();
    each(desk, PACK, all + wave.segments.size() * columns, [&](index task) {
      if (task < all)
        pack_block(wave, desk, task);
      else
        bias2_gradient(wave.segments[(task - all) / columns], (task - all) % columns * BLOCK);
    });
  }

  // dy as a left operand, dy and x as operands whose k are the rows; and dy . b2, the bias' part of the weight's
  // gradient.
  void pack_block(const Wave& wave, const Desk& desk, index b) const {
    const RowBlock& rows = wave.rows[b];
    const Segment& segment = wave.segments[rows.segment];
    const index* units = unit() + rows.start;
    const index first = segment.first_block, j = b - first;
    if (needs_hidden) {
      const Rows dy(pointer<Element>(c.grad), c.output, units, rows.count);
      for (index k = 0; k < output; ++k) {
        dy.ask(k * BLOCK + AHEAD);
        const index at = k * BLOCK, width = c.output - at;
        pack_left(desk.dy_left + (b * output + k) * TILE, dy.at, at, width);
        if (desk.dy_transposed)
          pack_left_transposed(desk.dy_transposed + (first * output + k * segment.blocks + j) * TILE, dy.at, at,
                               width);
      }
    }
    if (c.d_w1) {
      const Rows x(pointer<Element>(c.x), c.model, units, rows.count);
      for (index k = 0; k < model; ++k) {
        x.ask(k * BLOCK + AHEAD);
        pack_right(desk.x_right + (first * model + k * segment.blocks + j) * TILE, x.at, k * BLOCK,
                   c.model - k * BLOCK);
      }
    }
    if (c.d_weight && c.b2) bias_products(rows, segment.slot);
  }

  void bias_products(const RowBlock& rows, index slot) const {
    const Element* bias = pointer<Element>(c.b2) + slot * c.output;
    for (index row = rows.start; row < rows.start + rows.count; ++row) {
      const Element* dy = pointer<Element>(c.grad) + unit()[row] * c.output;
      Vector sum = constant(0.0f);
      for (index i = 0; i < c.output; i += 16)
        sum = fmadd(load_row(dy + i, c.output - i), load_row(bias + i, c.output - i), sum);
      pointer<float>(c.d_weight)[row] = reduce_add(sum);
    }
  }

  void bias2_gradient(const Segment& segment, index first) const {
    Element* target = pointer<Element>(c.d_b2) + segment.slot * c.output + first;
    const index width = least(BLOCK, c.output - first);
    for (index i = 0; i < width; i += 16) {
      Vector sum = segment.again ? load_row(target + i, width - i) : constant(0.0f);
      for (index row = segment.start; row < segment.start + segment.count; ++row) {
        const Element* dy = pointer<Element>(c.grad) + unit()[row] * c.output + first + i;
        const Vector factor = constant(weight() ? weight()[row] : 1.0f);
        sum = fmadd(factor, load_row(dy, width - i), sum);
      }
      store_row(target + i, sum, width - i);
    }
  }

  // g, and all that follows from it elementwise. One task: some column blocks of the hidden layer of a segment.
  void hidden_gradient(const Wave& wave, const Desk& desk, Span span, const Multiplier& multiply, const Portion& w1) {
    const index width = task_width(span.number, output, desk.is_shared ? c.threads : 1, WIDEST_OF_K);
    const index groups = (span.number + width - 1) / width;
    Pipeline<HiddenGradient> pipeline(multiply);
    alignas(64) Element rows[2][3][TILE];
    each(desk, HIDDEN, wave.segments.size() * groups, [&](index task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * width, number = least(width, span.number - first);
      alignas(64) float d_bias[WIDEST_OF_K][2][BLOCK] = {};
      const Element* weights = pointer<Element>(c.w2) + segment.slot * c.output * c.hidden;
      pack_columns_of_k(desk.panel, output, weights, c.hidden, c.output, span.first + first, number);
      const index next = first + number;
      const Portion soon = next < span.number
                               ? Portion{columns_of_k(weights, c.hidden, c.output, span.first + next, width)}
                               : w1;
      for (index j = 0; j < segment.blocks; ++j) {
        const index b = segment.first_block + j;
        Operands<Element> operands = {desk.dy_left + b * output * TILE, desk.panel, output * TILE, 1, c.output};
        operands.next_left = operands.left + output * TILE;
        operands.next_right = desk.panel;
        const index last = (number - 1) / ABREAST * ABREAST, row = wave.rows[b].count * halves * c.hidden;
        pipeline.products(operands, number, wave.rows[b].count,
                          desk.is_shared ? Portion{packed_rows(desk.dy_left, b + 1, output)}
                                         : soon.of(j, segment.blocks),
                          [&](index i) {
                            const index next = i < last ? ABREAST * BLOCK : row - last * BLOCK;
                            return hidden_gradient_of(wave, desk, b, span, first + i, next, rows[i % 2], d_bias[i]);
                          });
      }
      pipeline.drain();
      for (index i = 0; c.d_b1 && i < number; ++i) store_bias1(segment, (span.first + first + i) * BLOCK, d_bias[i]);
    });
  }

  // The same for an expert of few rows, where a span is all of the hidden layer.
  void hidden_strips(const Wave& wave, const Desk& desk, Span span, const Multiplier& multiply) const {
    const Segment& segment = wave.segments[0];
    const ByK weights = {pointer<Element>(c.w2) + segment.slot * c.output * c.hidden, c.hidden, c.output};
    Strips strips(multiply, wave);
    for (index column = 0; column < hidden; column += ABREAST) {
      alignas(64) float d_bias[ABREAST][2][BLOCK] = {};
      strips.product(desk.dy_left, weights, column, Area(), [&](index b, index i) {
        return hidden_gradient_of(wave, desk, b, span, i, ABREAST * BLOCK, nullptr, d_bias[i - column]);
      });
      for (index i = column; c.d_b1 && i < least(column + ABREAST, hidden); ++i)
        store_bias1(segment, i * BLOCK, d_bias[i - column]);
    }
  }

  // What the gradients of the rows read of w1 for a span, which follows soon where it is not all of the hidden layer.
  Area first_weights(const Segment& segment, const Desk& desk, Span span) const {
    if (!c.d_x || desk.span == hidden) return {};
    return columns_of(pointer<Element>(c.w1) + segment.slot * halves * c.hidden * c.model, halves, c.hidden, c.model,
                      span.first, span.number);
  }

  void store_bias1(const Segment& segment, index first, const float (&d_bias)[2][BLOCK]) const {
    const index width = least(BLOCK, c.hidden - first);
    for (index half = 0; half < halves; ++half) {
      Element* target = pointer<Element>(c.d_b1) + (segment.slot * halves + half) * c.hidden + first;
      for (index i = 0; i < width; i += 16) {
        Vector sum = load(d_bias[half] + i);
        if (segment.again) sum = add(sum, load_row(target + i, width - i));
        store_row(target + i, sum, width - i);
      }
    }
  }

  // `column` counts from the span's first one; `rows` are room for what is packed again, where nothing is TURNED.
  HiddenGradient hidden_gradient_of(const Wave& wave, const Desk& desk, index b, Span span, index column, index next,
                                    Element (*rows)[TILE], float (&d_bias)[2][BLOCK]) const {
    const RowBlock& block = wave.rows[b];
    const Segment& segment = wave.segments[block.segment];
    const index start = segment.first_block, j = b - start, first = (span.first + column) * BLOCK;
    HiddenGradient result;
    result.steps = TURNED ? block.count : BLOCK + halves + 1;
    result.count = block.count;
    result.width = c.hidden - first;
    result.stride = c.hidden;
    result.halves = halves;
    result.weight_stride = hidden;
    result.row = HIDDEN_GRADIENT_ROW[c.activation];
    result.next = next;
    result.pre = pointer<Element>(c.pre) + block.start * halves * c.hidden + first;
    if (weight()) result.weight = weight() + block.start;
    if (c.d_weight) result.weight_parts = desk.weight_parts + b * BLOCK * hidden + span.first + column;
    if (c.d_b1) result.d_bias = d_bias;
    if (c.d_w2)
      result.hidden_right = desk.hidden_right + (start * span.number + column * segment.blocks + j) * TILE;
    result.hidden_rows = TURNED ? result.hidden_right : rows[2];
    for (index half = 0; half < halves; ++half) {
      const index place = half * span.number + column;
      if (desk.d_pre_left) result.d_pre_rows[half] = desk.d_pre_left + (b * halves * span.number + place) * TILE;
      else if (c.d_w1) result.d_pre_rows[half] = rows[half];
      if (desk.d_pre_transposed)
        result.d_pre_transposed[half] =
            desk.d_pre_transposed + (start * halves * span.number + place * segment.blocks + j) * TILE;
    }
    return result;
  }

  void sum_weight_parts(const Wave& wave, const Desk& desk) {
    each(desk, WEIGHTS, wave.rows.size(), [&](index b) {
      for (index r = 0; r < wave.rows[b].count; ++r) {
        float sum = 0;
        for (index i = 0; i < hidden; ++i) sum += desk.weight_parts[(b * BLOCK + r) * hidden + i];
        pointer<float>(c.d_weight)[wave.rows[b].start + r] += sum;
      }
    });
  }

  // Row blocks of a weight gradient that are computed side by side. In bf16 one: writing whole rows is half of the time,
  // unless the right operand is too large to stay in the second-level cache; then it is read once for several.
  static index rows_abreast(const Wave& wave, index column_blocks) {
    constexpr index NEAR_TILES = 512;
    const index depth = wave.rows.size() / wave.segments.size();
    return IS_BF16 && depth * column_blocks <= NEAR_TILES ? 1 : 4;
  }

  // The left operand's tiles are [block][rows], or where they are TURNED [rows][block].
  // One task: some row blocks of the gradient, whose left operands stay in the cache over all columns.
  void outer_product(const Wave& wave, const Desk& desk, const Multiplier& multiply, const Outer& o) {
    const index row_blocks = o.of_rows.number, column_blocks = o.of_columns.number;
    const index group = rows_abreast(wave, column_blocks), all = row_blocks * o.parts;
    const index groups = (all + group - 1) / group, turns = (column_blocks + ABREAST - 1) / ABREAST;
    const bool streams = reinterpret_cast<index>(o.target) % 64 == 0 && o.columns * sizeof(Element) % 64 == 0;
    Pipeline<StoreRows> pipeline(multiply);
    each(desk, o.stage, wave.segments.size() * groups, [&](index task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * group, number = least(group, all - first);
      const index depth = segment.blocks, left_step = TURNED ? all * TILE : TILE;
      const Element* lefts = o.left + segment.first_block * all * TILE;
      const Element* rights = o.right + segment.first_block * column_blocks * TILE;
      for (index column = 0; column < column_blocks; column += ABREAST)
        for (index row = first; row < first + number; ++row) {
          const index within = (o.of_rows.first + row % row_blocks) * BLOCK, height = least(BLOCK, o.rows - within);
          Element* place = o.target + ((segment.slot * o.parts + row / row_blocks) * o.rows + within) * o.columns;
          Operands<Element> operands = {lefts + row * (TURNED ? 1 : depth) * TILE, rights + column * depth * TILE,
                                        depth * TILE, 1, segment.count, segment.height, left_step, TURNED};
          operands.next_left = operands.left + (TURNED ? 1 : depth) * TILE;
          operands.next_right = operands.right;
          const index turn = column / ABREAST;
          const Portion next = o.soon.area.rows
                                   ? o.soon.of(first * turns + turn * number + row - first, all * turns)
                                   : Portion{packed_rows(rights, turn + 1, ABREAST * depth), row - first, group};
          pipeline.products(operands, least(ABREAST, column_blocks - column), height, next, [&](index i) {
            const index at = (o.of_columns.first + column + i) * BLOCK;
            return StoreRows{height, place + at, o.columns, o.columns - at, nullptr, segment.again,
                             streams && !segment.again};
          });
        }
      pipeline.drain();
      if (streams) _mm_sfence();
    });
  }

  // One task: some column blocks of the rows' gradients of a segment.
  void input_gradient(const Wave& wave, const Desk& desk, Span span, const Multiplier& multiply, const Portion& w2) {
    const bool is_whole = span.number == hidden;
    const index depth = halves * span.number;
    const index width = task_width(model, depth, desk.is_shared ? c.threads : 1, is_whole ? WIDEST : WIDEST_OF_K);
    const index groups = (model + width - 1) / width, size = least(span.number * BLOCK, c.hidden - span.first * BLOCK);
    Pipeline<SpanRows> pipeline(multiply);
    each(desk, INPUT, wave.segments.size() * groups, [&](index task) {
      const Segment& segment = wave.segments[task / groups];
      const index first = task % groups * width, number = least(width, model - first);
      const Element* weights =
          pointer<Element>(c.w1) + (segment.slot * halves * c.hidden + span.first * BLOCK) * c.model;
      for (index half = 0; half < halves; ++half)
        pack_columns_of_k(desk.panel + half * span.number * TILE, depth, weights + half * c.hidden * c.model, c.model,
                          size, first, number);
      const Portion soon = is_whole ? Portion{columns_of_k(weights, c.model, halves * c.hidden, first + number, width)}
                                    : w2.of(task, groups);
      for (index j = 0; j < segment.blocks; ++j) {
        const index b = segment.first_block + j;
        Operands<Element> operands = {desk.d_pre_left + b * depth * TILE, desk.panel, depth * TILE, 1,
                                      halves == 1 ? size : depth * BLOCK};
        operands.next_left = operands.left + depth * TILE;
        operands.next_right = desk.panel;
        if (span.first) operands.begin = waiting(desk, b, first);
        pipeline.products(operands, number, wave.rows[b].count,
                          desk.is_shared ? Portion{packed_rows(desk.d_pre_left, b + 1, depth)}
                                         : soon.of(j, segment.blocks),
                          [&](index i) { return input_rows(wave, desk, b, span, first + i); });
      }
      pipeline.drain();
    });
  }

  void input_strips(const Wave& wave, const Desk& desk, Span span, const Multiplier& multiply) const {
    const Segment& segment = wave.segments[0];
    const ByK weights = {pointer<Element>(c.w1) + segment.slot * c.hidden * c.model, c.model, c.hidden};
    Strips strips(multiply, wave);
    for (index column = 0; column < model; column += ABREAST)
      strips.product(desk.d_pre_left, weights, column, Area(),
                     [&](index b, index i) { return input_rows(wave, desk, b, span, i); });
  }

  SpanRows input_rows(const Wave& wave, const Desk& desk, index b, Span span, index column) const {
    const RowBlock& rows = wave.rows[b];
    const index at = column * BLOCK;
    const bool is_last = span.first + span.number == hidden;
    return {rows.count, pointer<Element>(c.d_rows) + rows.start * c.model + at, c.model, c.model - at,
            is_last ? nullptr : waiting(desk, b, column)};
  }

  float* waiting(const Desk& desk, index b, index column) const { return desk.x_sums + (b * model + column) * TILE; }

  // What the next span reads of w2, or the first one of the thread's next expert.
  Area next_second_weights(const Segment& segment, const Desk& desk, Span span) const {
    if (desk.span == hidden) return {};
    index slot = segment.slot, first = span.first + span.number;
    if (first == hidden) {
      const index following = desk.turn->following();
      if (following < 0) return {};
      slot = plan.alone[following].segments[0].slot, first = 0;
    }
    return columns_of_k(pointer<Element>(c.w2) + slot * c.output * c.hidden, c.hidden, c.output, first, desk.span);
  }

  const BackwardCall& c;
  const Plan& plan;
  const index halves, model, hidden, output;  // the sizes in blocks
  const bool needs_hidden;
  const index desks_at_once;
  Stages stages;
  Turns turns;
  std::vector<Desk> desks;  // one per thread, and those of shared waves
};

inline index backward(const BackwardCall& call) { return run_pass<Backward>(call); }

}  // namespace
