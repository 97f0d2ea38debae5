// Candidates to bins, in order of priority: a stable counting sort over ranges of candidates, the same for any
// number of ranges.
#pragma once
#include <algorithm>

#include "block.h"

namespace {

struct Groups {
  index candidates, bins, ranges;
  const index* key;       // the bin of each candidate, most important first; outside [0, bins): absent
  const index* capacity;  // how many each bin keeps; null: `limit`
  index limit;            // of every bin; negative: none
  index* counts;          // how many each bin has kept
  // Of size `scratch`: where each bin begins; per range, where its next candidate without a place goes and the
  // rank of its next candidate in each bin.
  index* start;
  index* rest() const { return start + bins; }
  index* next(index range) const { return start + bins + ranges + range * bins; }

  static index scratch(index bins, index ranges) { return bins + ranges + ranges * bins; }

  index first(index range) const { return candidates * range / ranges; }

  // Any order of ranges.
  void count(index range) const {
    index *mine = next(range), absent = 0;
    std::fill(mine, mine + bins, 0);
    for (index i = first(range); i < first(range + 1); ++i) {
      if (is_present(key[i]))
        ++mine[key[i]];
      else
        ++absent;
    }
    rest()[range] = absent;
  }

  // Once, after all ranges were counted: counts to first ranks and rows.
  void plan() const {
    index row = 0;
    for (index bin = 0; bin < bins; ++bin) {
      const index room = room_of(bin);
      index rank = 0;
      for (index range = 0; range < ranges; ++range) {
        const index count = next(range)[bin];
        next(range)[bin] = rank;
        rest()[range] += count - std::min(count, std::max<index>(0, room - rank));
        rank += count;
      }
      start[bin] = row;
      counts[bin] = std::min(rank, room);
      row += counts[bin];
    }
    for (index range = 0; range < ranges; ++range) {
      const index count = rest()[range];
      rest()[range] = row;
      row += count;
    }
  }

  // put(row, place in the bin, or -1 for none) for each candidate of a range, in order. Any order of ranges.
  template <typename Put>
  void place(index range, Put put) const {
    index *mine = next(range), free_row = rest()[range];
    for (index i = first(range); i < first(range + 1); ++i) {
      const index bin = key[i];
      const index rank = is_present(bin) ? mine[bin]++ : -1;
      if (rank >= 0 && rank < counts[bin])
        put(start[bin] + rank, rank);
      else
        put(free_row++, -1);
    }
  }

 private:
  bool is_present(index bin) const { return uint64_t(bin) < uint64_t(bins); }
  index room_of(index bin) const {
    if (capacity) return std::max<index>(0, capacity[bin]);
    return limit < 0 ? candidates : limit;
  }
};

}  // namespace
