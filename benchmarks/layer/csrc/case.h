// A configuration of the benchmark as the parts of a layer see it: sizes, tensors by their address, and memory near
// each thread.
#pragma once
#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "activations.h"
#include BLOCK_HEADER
#include "mlp_backward.h"
#include "mlp_forward.h"

namespace {

struct Case {  // in the order of `FIELDS` in parts.py
  index units, rows, model, hidden, experts, gated, activation, threads, amx, tiles;
  index x, unit, counts, weight, w1, w2, grad, pre, y_rows, y, d_w1, d_w2, near;

  index halves() const { return gated ? 2 : 1; }
  const Element* first_weights(index slot) const { return pointer<Element>(w1) + slot * halves() * hidden * model; }
  const Element* second_weights(index slot) const { return pointer<Element>(w2) + slot * model * hidden; }
};

// The rows of one expert, in blocks as the kernels cut them.
struct Group {
  index slot, start, count, blocks, height;

  index first(index block) const { return start + block * height; }
  index in(index block) const { return least(height, count - block * height); }
};

inline std::vector<Group> groups_of(const Case& c) {
  std::vector<Group> groups;
  index start = 0;
  for (index slot = 0; slot < c.experts; ++slot) {
    const index count = pointer<index>(c.counts)[slot], parts = blocks(count);
    if (count) groups.push_back({slot, start, count, parts, EVEN ? (count + parts - 1) / parts : BLOCK});
    start += count;
  }
  return groups;
}

// Operands of a thread, and room for what it makes. All are random numbers at first: the rates of products and of
// activations depend on them.
struct Desk {
  static constexpr index AREAS = 6;  // of `tiles` each

  Element *left, *right, *rows, *made;

  explicit Desk(const Case& c) {
    const index area = c.tiles * TILE;
    left = pointer<Element>(c.near) + AREAS * area * omp_get_thread_num();
    right = left + area;
    rows = right + area;
    made = rows + area;
  }

  // Where the tile of a column of a row block is packed, in the `number`-th of the operands that have `columns`: each
  // at a place of its own, as in a layer, or a few that stay near.
  Element* tile(index number, index columns, const Group& group, index j, index column, bool far) const {
    constexpr index FEW = 8;
    const index place = far ? (number * group.blocks + j) * columns + column : number * FEW + column % FEW;
    return made + place * TILE;
  }
};

constexpr index PARTS = 4;  // of the work for an expert, so that no thread waits long for another

struct Share {
  index part;

  index begin(index size) const { return size * part / PARTS; }
  index end(index size) const { return size * (part + 1) / PARTS; }
};

// Seconds of `body(group, share, multiply, desk)` for all experts with rows, on all threads at once.
template <typename Body>
double timed(const Case& c, const Body& body) {
  const std::vector<Group> groups = groups_of(c);
  double begin = 0;
  on_threads(c.threads, [&] {
    const Multiplier multiply(c.amx);
    const Desk desk(c);
#pragma omp barrier
#pragma omp master
    begin = omp_get_wtime();
#pragma omp for schedule(dynamic)
    for (index i = 0; i < (index)groups.size() * PARTS; ++i)
      body(groups[i / PARTS], Share{i % PARTS}, multiply, desk);
    _mm_sfence();
  });
  return omp_get_wtime() - begin;
}

}  // namespace
