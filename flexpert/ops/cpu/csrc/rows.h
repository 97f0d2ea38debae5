// Rows by unit: gathered, and summed back by weight. Rows past the sum of the counts belong to no unit.
#pragma once
#include <cstring>

#include "route.h"
#include "vector.h"

namespace {

constexpr index BAD_UNIT = 3;

// In the order of rows.py, for every call; what a call has not is null.
struct RowsCall {
  index units, rows, size, experts, threads;
  index of_units, of_rows, unit, weight, counts, d_weight;
};

template <typename Element>
class Rows {
 public:
  explicit Rows(const RowsCall& call)
      : c(call), unit_(pointer<index>(c.unit)), weight_(pointer<float>(c.weight)),
        threads_(ranges_for(c.rows * c.size, c.threads)) {
    for (index expert = 0; expert < c.experts; ++expert) total_ += pointer<index>(c.counts)[expert];
  }

  // Rows of their units, times their weights where there are any; 0 for those of none.
  index gather() const {
    if (!is_valid()) return BAD_UNIT;
    on_threads(threads_, [this] {
#pragma omp for schedule(static)
      for (index i = 0; i < c.rows; ++i) take(i);
    });
    return ROUTED;
  }

  // Of each unit the sum of its rows times their weights, in their order.
  index sum() const {
    if (!is_valid()) return BAD_UNIT;
    Room room(Room::size<index>(c.units + 1) + Room::size<index>(total_));
    if (!room) return NO_ROOM;
    index *end = room.take<index>(c.units + 1), *row = room.take<index>(total_);
    std::memset(end, 0, sizeof(index) * (c.units + 1));
    for (index i = 0; i < total_; ++i) ++end[unit_[i] + 1];
    for (index u = 0; u < c.units; ++u) end[u + 1] += end[u];
    for (index i = 0; i < total_; ++i) row[end[unit_[i]]++] = i;  // ends become those of their own units
    on_threads(threads_, [&] {
#pragma omp for schedule(static)
      for (index u = 0; u < c.units; ++u) add_up(u, row + (u ? end[u - 1] : 0), row + end[u]);
    });
    return ROUTED;
  }

  // The product of each row and its unit: the gradient of its weight.
  index dots() const {
    if (!is_valid()) return BAD_UNIT;
    on_threads(threads_, [this] {
#pragma omp for schedule(static)
      for (index i = 0; i < c.rows; ++i)
        pointer<float>(c.d_weight)[i] = i < total_ ? dot(of_unit(unit_[i]), of_row(i)) : 0.0f;
    });
    return ROUTED;
  }

 private:
  bool is_valid() const {
    if (total_ < 0 || total_ > c.rows) return false;
    for (index i = 0; i < total_; ++i)
      if (uint64_t(unit_[i]) >= uint64_t(c.units)) return false;
    return true;
  }
  Element* of_unit(index unit) const { return pointer<Element>(c.of_units) + unit * c.size; }
  Element* of_row(index row) const { return pointer<Element>(c.of_rows) + row * c.size; }

  void take(index i) const {
    if (i >= total_) {
      std::memset(of_row(i), 0, sizeof(Element) * c.size);
    } else if (!weight_) {
      std::memcpy(of_row(i), of_unit(unit_[i]), sizeof(Element) * c.size);
    } else {
      const Element* from = of_unit(unit_[i]);
      const Vector weight = constant(weight_[i]);
      for (index d = 0; d < c.size; d += LANES)
        store(of_row(i) + d, mul(weight, load(from + d, c.size - d)), c.size - d);
    }
  }

  void add_up(index unit, const index* row, const index* end) const {
    for (index d = 0; d < c.size; d += LANES) {
      const index left = c.size - d;
      Vector sum = constant(0.0f);
      for (const index* at = row; at < end; ++at) {
        const Vector value = load(of_row(*at) + d, left);
        sum = weight_ ? fmadd(constant(weight_[*at]), value, sum) : add(sum, value);
      }
      store(of_unit(unit) + d, sum, left);
    }
  }

  float dot(const Element* a, const Element* b) const {
    Vector sum = constant(0.0f);
    for (index d = 0; d < c.size; d += LANES) sum = fmadd(load(a + d, c.size - d), load(b + d, c.size - d), sum);
    return reduce_add(sum);
  }

  const RowsCall c;
  const index* unit_;
  const float* weight_;
  const index threads_;
  index total_ = 0;
};

}  // namespace
