// What the forward and the backward pass of the grouped MLP share: packing of rows and weights, sums over rows.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "plan.h"
#include "threads.h"

namespace {

constexpr index AHEAD = 4 * BLOCK;  // elements asked for before they are needed

inline void prefetch(const Element* address) { _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0); }

// Pointers to 32 source rows, null past `count`.
struct Rows {
  const Element* at[BLOCK];

  Rows(const Element* base, index stride, index count) {
    for (index i = 0; i < BLOCK; ++i) at[i] = i < count ? base + i * stride : nullptr;
  }
  Rows(const Element* base, index stride, const index* unit, index count) {
    for (index i = 0; i < BLOCK; ++i) at[i] = i < count ? base + unit[i] * stride : nullptr;
  }

  void ask(index first) const {  // soon for the elements from `first` on
    for (const Element* row : at)
      if (row) prefetch(row + first);
  }
};

// The right operand of 32 columns from `first` on, of weights stored [columns][size of k].
inline void pack_columns(Element* panel, const Element* weights, index columns, index size, index first) {
  const Rows rows(weights + first * size, size, columns - first);
  for (index k = 0; k < size; k += BLOCK, panel += TILE) {
    for (index i = 0; i < least(BLOCK, columns - first); ++i) prefetch(rows.at[i] + k + AHEAD);
    pack_right_transposed(panel, rows.at, k, size - k);
  }
}

// Right operands of 32 columns each, `depth` tiles apart: column blocks first .. first + number of weights
// stored [size of k][columns].
template <typename M = Multiplier>
void pack_columns_of_k(Element* panels, index depth, const Element* weights, index columns, index size, index first,
                       index number) {
  for (index k = 0; k < size; k += BLOCK, panels += TILE) {
    if constexpr (M::HAS_TILES) {
      M::pack_rights(panels, depth * TILE, weights + k * columns + first * BLOCK, columns, size - k,
                     columns - first * BLOCK, number);
      continue;
    }
    const Rows rows(weights + k * columns, columns, size - k);
    for (index i = 0; i < number; ++i) {
      const index at = (first + i) * BLOCK;
      for (index r = 0; r < least(BLOCK, size - k); ++r) prefetch(rows.at[r] + BLOCK * columns + at);
      pack_right(panels + i * depth * TILE, rows.at, at, columns - at);
    }
  }
}

// The left operand of one block of gathered rows.
inline void pack_rows(Element* tiles, const Element* source, index size, const index* unit, index count) {
  const Rows rows(source, size, unit, count);
  for (index k = 0; k < size; k += BLOCK, tiles += TILE) pack_left(tiles, rows.at, k, size - k);
}

// Memory that products ask for while they run, so that it is near when its turn comes: `rows` of `bytes` each,
// `stride` bytes apart.
struct Area {
  const void* base = nullptr;
  index bytes = 0, stride = 0, rows = 0;
};

// One of equal parts of an area, which themselves fall into parts.
struct Portion {
  Area area;
  index part = 0, parts = 1;

  Portion of(index i, index number) const { return {area, part * number + i, parts * number}; }
};

// The lines of a portion, some at each of `steps` calls: not so many that they hold up the loads of a product that runs
// ten times as fast in bf16.
struct Ahead {
  const char *next = nullptr, *row_end = nullptr;
  index left = 0, lines = 0, bytes = 0, stride = 0;
  bool twins = false;

  Ahead(const Portion& of, index steps) : bytes(of.area.bytes), stride(of.area.stride) {
    const index per_row = (bytes + 63) / 64, share = (per_row * of.area.rows + of.parts - 1) / of.parts;
    const index first = of.part * share;
    left = least(share, per_row * of.area.rows - first);
    if (left <= 0 || steps <= 0) return;
    lines = least(sizeof(Element) == 2 ? 8 : 32, (share + steps - 1) / steps);
    const char* row = static_cast<const char*>(of.area.base) + first / per_row * stride;
    next = row + first % per_row * 64;
    row_end = row + bytes;
  }
  Ahead() = default;

  void step() {
    for (index i = 0; i < lines && left > 0; ++i) {
      __builtin_prefetch(next, 0, 2);
      advance(1);
    }
  }

  // For products that ask at each of their steps instead: cut into `number` stretches, each of which lies in one row,
  // or if that is too little, with its twin in two.
  void cut(index number) {
    const index per_row = (bytes + 63) / 64, wanted = least(BLOCK, (left + number - 1) / number);
    lines = wanted <= 0 || wanted >= per_row ? per_row : (per_row + per_row / wanted - 1) / (per_row / wanted);
    twins = wanted > per_row;
  }

  // The next stretch, to be asked for in so many steps; `other` is what is asked for when all was taken.
  Stretch take(index steps, const void* other) {
    if (left <= 0) return {static_cast<const char*>(other), 0, 0};
    const index count = least(least(lines, left), (row_end - next + 63) / 64);
    Stretch result = {next, (count * 64 + steps - 1) / steps, 0};
    advance(count);
    if (twins && left > 0) {
      result.twin = next - result.first;
      advance(least(count, left));
    }
    return result;
  }

 private:
  void advance(index count) {
    left -= count;
    next += count * 64;
    if (next < row_end) return;
    next = row_end += stride;
    next -= bytes;
  }
};

// What packing will read: one block of packed rows, or blocks of weights stored [parts][columns][size of k].
inline Area packed_rows(const Element* tiles, index b, index depth) {
  const index bytes = depth * TILE * sizeof(Element);
  return {tiles + b * depth * TILE, bytes, bytes, 1};
}

inline Area packed_panels(const Element* first, index tiles) {
  return {first, tiles * TILE * (index)sizeof(Element), 0, tiles > 0 ? 1 : 0};
}

inline Area columns_of(const Element* weights, index parts, index columns, index size, index first, index number) {
  const index count = least(columns - first * BLOCK, number * BLOCK), line = size * sizeof(Element);
  return {weights + first * BLOCK * size, std::max<index>(0, count * line), columns * line, count > 0 ? parts : 0};
}

inline Area columns_of_k(const Element* weights, index columns, index size, index first, index number) {
  const index count = least(columns - first * BLOCK, number * BLOCK), line = sizeof(Element);
  return {weights + first * BLOCK, std::max<index>(0, count * line), columns * line, count > 0 ? size : 0};
}

// Products of a left operand with one right operand or two, and epilogues that take the sums up row by row while
// the next product runs: the unit for matrix products leaves the others idle. Epilogues run in the order of the
// products: one for each right operand, or one for both.
//
// An epilogue has a number of `steps` and `step(i, sums)`.
template <typename Epilogue>
class Pipeline {
 public:
  explicit Pipeline(const Multiplier& multiply) : multiply(multiply) {}

  void product(const Operands<Element>& operands, index rows, Ahead ahead, const Epilogue& first,
               const Epilogue* second = nullptr) {
    const index calls = std::max<index>(1, operands.parts * k_blocks(operands));
    const index share = (left_over() + calls - 1) / calls;
    multiply(operands, sums[turn], rows, [&] {
      ahead.step();
      for (index i = 0; i < share && at < end; ++i) advance();
    });
    drain();
    pending[0] = first;
    if (second) pending[1] = *second;
    at = done = 0;
    end = second ? 2 : 1;
    turn ^= 1;
  }

  // The products of one left operand with `number` right ones, ABREAST at a time; `epilogue(i)` makes that of the i-th.
  // They ask for a portion of what comes next.
  template <typename Make>
  void products(Operands<Element> operands, index number, index rows, const Portion& soon, const Make& epilogue) {
    const index times = (number + ABREAST - 1) / ABREAST, depth = k_blocks(operands);
    const Element *left = operands.next_left, *right = operands.next_right;
    for (index i = 0; i < number; i += ABREAST, operands.right += ABREAST * operands.apart) {
      const Ahead ahead(soon.of(i / ABREAST, times), ABREAST * depth);
      const bool ends = i + ABREAST >= number;
      operands.parts = least(ABREAST, number - i);
      operands.next_left = ends ? left : operands.left;
      operands.next_right = ends ? right : operands.right + ABREAST * operands.apart;
      if (i && operands.begin) operands.begin += ABREAST * TILE;
      if (operands.parts == 2) {
        const Epilogue second = epilogue(i + 1);
        product(operands, rows, ahead, epilogue(i), &second);
      } else {
        product(operands, rows, ahead, epilogue(i));
      }
    }
  }

  void drain() {
    while (at < end) advance();
  }

 private:
  static index k_blocks(const Operands<Element>& o) { return (o.k + o.height - 1) / o.height; }

  index left_over() const {
    index steps = -done;
    for (index i = at; i < end; ++i) steps += pending[i].steps;
    return steps;
  }

  void advance() {
    pending[at].step(done, sums[turn ^ 1] + at);
    if (++done < pending[at].steps) return;
    ++at;
    done = 0;
  }

  const Multiplier& multiply;
  Epilogue pending[2];
  index at = 0, end = 0, done = 0, turn = 0;
  alignas(64) float sums[2][2][TILE];
};

// Rows of a result: with a bias of their columns, or added to what is there.
struct StoreRows {
  index steps = 0;  // rows
  Element* target = nullptr;
  index stride = 0, width = 0;
  const Element* bias = nullptr;
  bool adds = false, streams = false;

  void step(index r, Sums sums) const {
    Vector low = load(sums[0] + r * BLOCK), high = load(sums[0] + r * BLOCK + 16);
    Element* place = target + r * stride;
    if (const Element* other = adds ? place : bias) {
      low = add(low, load_row(other, width));
      high = add(high, load_row(other + 16, width - 16));
    }
    store_32(place, low, high, width, streams);
  }
};

// result[u] = sum of weight * rows over the rows of unit u, in their order. Inside a parallel region.
inline void combine(const Plan& plan, const Element* rows, const float* weight, Element* result, index units,
                    index width) {
#pragma omp for schedule(static)
  for (index u = 0; u < units; ++u) {
    const index *row = plan.row_of.data() + plan.first_row[u], *end = plan.row_of.data() + plan.first_row[u + 1];
    for (index i = 0; i < width; i += BLOCK) {
      Vector low = constant(0.0f), high = low;
      for (const index* at = row; at < end; ++at) {
        const Vector factor = constant(weight ? weight[*at] : 1.0f);
        const Element* source = rows + *at * width + i;
        low = fmadd(factor, load_row(source, width - i), low);
        high = fmadd(factor, load_row(source + 16, width - i - 16), high);
      }
      store_32(result + u * width + i, low, high, width - i);
    }
  }
}

// Results are rounded to Element, so that fp32 needs the activations exact.
template <index KIND>
inline Both activate(Vector x) {
  return activate<KIND, sizeof(Element) == 4>(x);
}

// Inside a parallel region: fill with zeros, all threads together; of `parts` of `bytes` each those that are not kept.
template <typename Keeps>
void clear(void* target, index bytes, index parts, const Keeps& keeps) {
  constexpr index CHUNK = 1 << 18;
  const index chunks = (bytes + CHUNK - 1) / CHUNK;
#pragma omp for schedule(static) nowait
  for (index i = 0; i < parts * chunks; ++i) {
    const index part = i / chunks, first = i % chunks * CHUNK;
    if (!keeps(part)) std::memset(static_cast<char*>(target) + part * bytes + first, 0, least(CHUNK, bytes - first));
  }
}

inline void clear(void* target, index bytes) {
  clear(target, bytes, 1, [](index) { return false; });
}

constexpr bool IS_BF16 = sizeof(Element) == 2;
constexpr index WIDEST = IS_BF16 ? 8 : 4, WIDEST_OF_K = IS_BF16 ? 16 : 4, PANEL_TILES = IS_BF16 ? 2048 : 128;

// Column blocks a task works on, so that packed rows are read once for all of them: as many as leave each
// of the threads some tasks to choose from, and leave the second-level cache room beside their `depth` tiles each.
inline index task_width(index column_blocks, index depth, index threads, index widest = WIDEST) {
  const index most = least(widest, std::max<index>(2, PANEL_TILES / std::max<index>(1, depth)));
  if (threads == 1) return least(most, column_blocks);
  return std::max<index>(1, least(most, column_blocks / (2 * threads)));
}

// Plan, place the buffers of and run one pass over all rows, of which experts have `most_few` or more.
template <typename Pass, typename Call>
index run_pass(const Call& call, index most_few = 0) {
  const Plan plan(call.units, call.rows, call.experts, call.slots, pointer<index>(call.unit),
                  pointer<index>(call.counts), pointer<index>(call.slot), call.threads, most_few);
  if (plan.status != DONE) return plan.status;
  Pass pass(call, plan);
  Scratch scratch(pass.place(nullptr));
  if (!scratch) return NO_MEMORY;
  pass.place(&scratch);
  pass.run();
  return DONE;
}

}  // namespace
