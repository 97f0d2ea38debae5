// Rows grouped by expert to buffers of equal size and back. Groups of experts are sent to ranks, each in `copies`, so
// buffers lie by (group, copy, expert of the group).
#pragma once
#include <algorithm>

#include "rows.h"

namespace {

constexpr index BAD_COUNTS = 4;

struct BuffersCall {  // in the order of buffers.py
  index num_rows, experts, groups, copies, first, height, size, threads;  // `height` rows of each expert from `first` on
  index rows, buffers, counts;
};

template <typename Element>
class Buffers {
 public:
  explicit Buffers(const BuffersCall& call)
      : c(call), counts_(pointer<index>(c.counts)), each_(c.experts / c.groups),
        threads_(ranges_for(c.experts * c.copies * c.height * c.size, c.threads)) {}

  // Zeros after the rows that there are.
  index fill() const {
    return for_all([this](index expert, Element* rows, index count) {
      for (index copy = 0; copy < c.copies; ++copy) {
        Element* to = buffer(expert, copy);
        if (count) std::memcpy(to, rows, sizeof(Element) * count * c.size);
        std::memset(to + count * c.size, 0, sizeof(Element) * (c.height - count) * c.size);
      }
    });
  }

  // The sum of all copies.
  index read() const {
    return for_all([this](index expert, Element* rows, index count) {
      if (c.copies == 1 && count) {
        std::memcpy(rows, buffer(expert, 0), sizeof(Element) * count * c.size);
        return;
      }
      for (index d = 0; d < count * c.size; d += LANES) {
        const index left = count * c.size - d;
        Vector sum = load(buffer(expert, 0) + d, left);
        for (index copy = 1; copy < c.copies; ++copy) sum = add(sum, load(buffer(expert, copy) + d, left));
        store(rows + d, sum, left);
      }
    });
  }

 private:
  // body(expert, the first of its rows that are in these buffers, how many there are).
  template <typename Body>
  index for_all(const Body& body) const {
    if (!is_valid()) return BAD_COUNTS;
    if (c.height == 0) return ROUTED;  // buffers of no rows have no address
    on_threads(threads_, [&] {
#pragma omp for schedule(static)
      for (index expert = 0; expert < c.experts; ++expert) {
        index start = 0;
        for (index before = 0; before < expert; ++before) start += counts_[before];
        const index count = std::clamp<index>(counts_[expert] - c.first, 0, c.height);
        body(expert, count ? pointer<Element>(c.rows) + (start + c.first) * c.size : nullptr, count);
      }
    });
    return ROUTED;
  }

  bool is_valid() const {
    index left = c.num_rows;
    for (index expert = 0; expert < c.experts; ++expert) {
      if (counts_[expert] < 0 || counts_[expert] > left) return false;
      left -= counts_[expert];
    }
    return left == 0;
  }

  Element* buffer(index expert, index copy) const {
    const index place = (expert / each_ * c.copies + copy) * each_ + expert % each_;
    return pointer<Element>(c.buffers) + place * c.height * c.size;
  }

  const BuffersCall c;
  const index* counts_;
  const index each_, threads_;
};

}  // namespace
