// The six products of a layer, on operands that lie near: alone, beside their epilogues, and the epilogues alone.
#pragma once
#include "case.h"

namespace {

// What is measured: a product; its epilogue, whose rows are near, or lie where the layer has them; both as kernels
// interleave them, rows near; and a product that asks for the weights of an expert on its way.
enum How : index { PRODUCT, EPILOGUE, ON_MEMORY, BOTH, ASKING };

// (rows, k) times (k, columns), the columns in panels that stay in the second-level cache.
struct Product {
  index row_blocks, k, columns;  // columns in blocks
  bool pairs = false;            // of right operands
  index height = BLOCK;          // k of a tile
  bool turned = false;           // left tiles are read across
  index widest = WIDEST;         // columns of a panel

  index depth() const { return (k + height - 1) / height; }
  index width() const {
    constexpr index NEAR_TILES = (1 << 19) / (TILE * sizeof(Element));
    return least(least(columns, widest), std::max<index>(1, NEAR_TILES / (depth() * (pairs ? 2 : 1))));
  }
  index panels() const { return (columns + width() - 1) / width(); }
  index first(index panel) const { return panel * width(); }
  index number(index panel) const { return least(width(), columns - first(panel)); }
};

struct Idle {
  index steps = 1;

  void step(index, Sums) const {}
};

// A panel of a product, with `make(row block, column)` for its epilogues.
template <typename Epilogue, typename Rows, typename Make>
void multiply_panel(const Product& p, index panel, const Multiplier& multiply, const Desk& desk, const Area& soon,
                    const Rows& rows, const Make& make) {
  const index depth = p.depth(), first = p.first(panel), number = p.number(panel), step = p.turned ? 1 : depth;
  Pipeline<Epilogue> pipeline(multiply);
  for (index j = 0; j < p.row_blocks; ++j) {
    Operands<Element> operands = {desk.left + j * step * TILE, desk.right, depth * TILE, p.pairs ? 2 : 1, p.k,
                                  p.height, p.turned ? p.row_blocks * TILE : TILE, p.turned};
    operands.next_left = operands.left + step * TILE;
    operands.next_right = operands.right;
    if (!p.pairs) {
      pipeline.products(operands, number, rows(j), {soon, j, p.row_blocks},
                        [&](index i) { return make(j, first + i); });
      continue;
    }
    for (index i = 0; i < number; ++i, operands.right += 2 * depth * TILE) {
      const Ahead ahead(Portion{soon, j, p.row_blocks}.of(i, number), 2 * depth);
      pipeline.product(operands, rows(j), ahead, make(j, first + i));
    }
  }
  pipeline.drain();
}

template <typename Make>
void finish_panel(const Product& p, index panel, const Desk& desk, const Make& make) {
  const Sums sums = reinterpret_cast<Sums>(desk.right);
  for (index j = 0; j < p.row_blocks; ++j)
    for (index i = 0; i < p.number(panel); ++i) {
      const auto epilogue = make(j, p.first(panel) + i);
      for (index step = 0; step < epilogue.steps; ++step) epilogue.step(step, sums);
    }
}

// `shape(group)` is the product of an expert, `rows(group, j)` the rows of a block, `make(group, j, column, desk, far)`
// an epilogue, and `area(group, first, number)` what is asked for with some columns.
template <typename Shape, typename Rows, typename Make, typename Asked>
double stage(const Case& c, index how, const Shape& shape, const Rows& rows, const Make& make, const Asked& area) {
  return timed(c, [&](const Group& group, Share share, const Multiplier& multiply, const Desk& desk) {
    const Product p = shape(group);
    const auto rows_of = [&](index j) { return rows(group, j); };
    const auto epilogue = [&](index j, index column) { return make(group, j, column, desk, how == ON_MEMORY); };
    const auto idle = [](index, index) { return Idle(); };
    for (index panel = share.begin(p.panels()); panel < share.end(p.panels()); ++panel) {
      if (how == BOTH) {
        multiply_panel<decltype(epilogue(0, 0))>(p, panel, multiply, desk, Area(), rows_of, epilogue);
      } else if (how == PRODUCT || how == ASKING) {
        const Area soon = how == ASKING ? area(group, p.first(panel), p.number(panel)) : Area();
        multiply_panel<Idle>(p, panel, multiply, desk, soon, rows_of, idle);
      } else {
        finish_panel(p, panel, desk, epilogue);
      }
    }
  });
}

// Of the rows of an expert.
template <typename Make>
double data_stage(const Case& c, index how, index k, index columns, bool pairs, const Make& make) {
  return stage(
      c, how, [&](const Group& group) { return Product{group.blocks, k, blocks(columns), pairs}; },
      [](const Group& group, index j) { return group.in(j); }, make,
      [&](const Group& group, index first, index number) {
        return columns_of(c.first_weights(group.slot), pairs ? 2 : 1, c.hidden, c.model, first, number);
      });
}

// The gradient (rows, columns) of a weight, whose k are the rows of an expert.
inline double weight_stage(const Case& c, index how, index rows, index columns, Element* gradient) {
  return stage(
      c, how,
      [&](const Group& group) {
        return Product{blocks(rows), group.count, blocks(columns), false, group.height, TURNED, blocks(columns)};
      },
      [](const Group&, index) { return BLOCK; },
      [&](const Group& group, index j, index column, const Desk& desk, bool far) {
        const index at = column * BLOCK;
        Element* place = far ? gradient + (group.slot * rows + j * BLOCK) * columns : desk.rows;
        return StoreRows{BLOCK, place + at, columns, columns - at, nullptr, false, far};
      },
      [](const Group&, index, index) { return Area(); });
}

// The epilogue of g, as `Backward` makes it.
inline HiddenGradient hidden_gradient_of(const Case& c, const Group& group, index j, index column, const Desk& desk,
                                         bool far) {
  const index first = column * BLOCK, start = group.first(j), halves = c.halves(), columns = blocks(c.hidden);
  const auto tile = [&](index number) { return desk.tile(number, columns, group, j, column, far); };
  HiddenGradient g;
  g.steps = TURNED ? group.in(j) : BLOCK + halves + 1;
  g.count = group.in(j);
  g.width = c.hidden - first;
  g.stride = c.hidden;
  g.halves = halves;
  g.row = HIDDEN_GRADIENT_ROW[c.activation];
  g.pre = (far ? pointer<Element>(c.pre) + start * halves * c.hidden : desk.rows) + first;
  g.next = BLOCK;
  g.weight = pointer<float>(c.weight) + start;
  g.weight_stride = columns;
  g.weight_parts = reinterpret_cast<float*>(desk.rows + 4 * columns * TILE) + column;
  g.hidden_right = tile(0);
  g.hidden_rows = TURNED ? g.hidden_right : desk.rows + (5 * columns + column % 2) * TILE;
  for (index half = 0; half < halves; ++half) {
    g.d_pre_rows[half] = tile(1 + half);
    if (!TURNED) g.d_pre_transposed[half] = tile(1 + halves + half);
  }
  return g;
}

inline double first_product(const Case& c, index how) {
  return data_stage(c, how, c.model, c.hidden, c.gated,
                    [&](const Group& group, index j, index column, const Desk& desk, bool far) {
                      ForwardCall call = {};
                      call.hidden = c.hidden, call.gated = c.gated, call.activation = c.activation;
                      if (c.pre) call.pre = far ? c.pre : reinterpret_cast<index>(desk.rows);
                      return hidden_rows(call, far ? group.first(j) : 0, group.in(j), 0, column,
                                         desk.tile(0, blocks(c.hidden), group, j, column, far));
                    });
}

inline double second_product(const Case& c, index how) {
  return data_stage(c, how, c.hidden, c.model, false,
                    [&](const Group& group, index j, index column, const Desk& desk, bool far) {
                      ForwardCall call = {};
                      call.output = c.model;
                      call.y_rows = far ? c.y_rows : reinterpret_cast<index>(desk.rows);
                      return output_rows(call, far ? group.first(j) : 0, group.in(j), 0, column);
                    });
}

inline double hidden_gradient(const Case& c, index how) {
  return data_stage(c, how, c.model, c.hidden, false,
                    [&](const Group& group, index j, index column, const Desk& desk, bool far) {
                      return hidden_gradient_of(c, group, j, column, desk, far);
                    });
}

inline double row_gradient(const Case& c, index how) {
  return data_stage(c, how, c.halves() * c.hidden, c.model, false,
                    [&](const Group& group, index j, index column, const Desk& desk, bool far) {
                      const index at = column * BLOCK;
                      Element* rows = far ? pointer<Element>(c.y_rows) + group.first(j) * c.model : desk.rows;
                      return StoreRows{group.in(j), rows + at, c.model, c.model - at};
                    });
}

inline double second_gradient(const Case& c, index how) {
  return weight_stage(c, how, c.model, c.hidden, pointer<Element>(c.d_w2));
}

inline double first_gradient(const Case& c, index how) {
  return weight_stage(c, how, c.halves() * c.hidden, c.model, pointer<Element>(c.d_w1));
}

}  // namespace
