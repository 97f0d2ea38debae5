// The order of work: experts in waves, rows of an expert in blocks.
//
// Experts with not many rows, where there are enough of them for each thread to have several, are waves of one, each
// computed by one thread alone, so that what it packs stays in the caches of its core. The others are computed by all
// threads together: runs of experts with enough rows to keep all busy, few enough for the packed rows to stay near,
// and no two that share a weight slot, so that tasks of one wave never write the same gradient.
#pragma once
#include <algorithm>
#include <vector>

#include "calls.h"
#include "scratch.h"

namespace {

constexpr index WAVE_BLOCKS = 32, ALONE_ROWS = sizeof(Element) == 2 ? 512 : 1024;

struct Segment {
  index start, count;          // its rows
  index slot;                  // its weights
  index first_block, blocks;   // its row blocks in the wave
  index height;                // of these, but for the last one
  bool again;                  // an earlier wave has written gradients of this slot
};

struct RowBlock {
  index start, count, segment;
};

struct FewRowsOf {
  index start, count, slot;
  index first;  // rows of those before it
};

struct Wave {
  std::vector<Segment> segments;
  std::vector<RowBlock> rows;
};

struct Plan {
  std::vector<FewRowsOf> few;     // experts that have no more rows than `most_few`, and take no part in waves
  std::vector<Wave> shared, alone;
  std::vector<char> is_used;      // per slot
  std::vector<RowBlock> idle;     // rows of absent experts and past the total; of no segment
  std::vector<index> first_row;   // of each unit, in `row_of`; and the end
  std::vector<index> row_of;      // rows by unit, in their order
  index most_shared = 0, most_alone = 0;  // blocks of one wave
  index status;

  Plan(index units, index rows, index experts, index slots, const index* unit, const index* counts,
       const index* slot_of, index threads, index most_few = 0)
      : is_used(slots, 0) {
    status = find(rows, experts, slots, counts, slot_of);
    if (status == DONE) status = group(units, unit);
    if (status == DONE) take_few(most_few);
    if (status == DONE && !found.empty()) make_waves(threads);
  }

 private:
  struct Found {
    index start, count, slot;
  };
  std::vector<Found> found;

  index find(index rows, index experts, index slots, const index* counts, const index* slot_of) {
    index start = 0;
    for (index expert = 0; expert < experts; ++expert) {
      const index count = counts[expert], slot = slot_of ? slot_of[expert] : expert;
      if (count < 0 || count > rows - start) return TOO_MANY_ROWS;
      if (slot >= slots && count) return SLOT_OUT_OF_RANGE;
      if (count && slot >= 0)
        found.push_back({start, count, slot});
      else if (count)
        idle.push_back({start, count, -1});
      start += count;
    }
    if (start < rows) idle.push_back({start, rows - start, -1});
    return DONE;
  }

  index group(index units, const index* unit) {
    first_row.assign(units + 2, 0);
    index total = 0;
    for (const Found& f : found) {
      for (index row = f.start; row < f.start + f.count; ++row) {
        if (unit[row] < 0 || unit[row] >= units) return UNIT_OUT_OF_RANGE;
        ++first_row[unit[row] + 2];
      }
      total += f.count;
    }
    for (index u = 2; u < units + 2; ++u) first_row[u] += first_row[u - 1];
    row_of.resize(total);
    for (const Found& f : found)
      for (index row = f.start; row < f.start + f.count; ++row) row_of[first_row[unit[row] + 1]++] = row;
    return DONE;
  }

  void take_few(index most) {
    index first = 0;
    const auto is_few = [&](const Found& f) { return f.count <= most; };
    for (const Found& f : found)
      if (is_few(f)) {
        few.push_back({f.start, f.count, f.slot, first});
        first += f.count;
      }
    found.erase(std::remove_if(found.begin(), found.end(), is_few), found.end());
  }

  void make_waves(index threads) {
    std::vector<index> uses(is_used.size(), 0), wave_of(is_used.size(), -1);
    for (const Found& f : found) ++uses[f.slot];
    const auto is_small = [&](const Found& f) { return f.count <= ALONE_ROWS && uses[f.slot] == 1; };
    const bool has_many = std::count_if(found.begin(), found.end(), is_small) >= 4 * threads;
    for (const Found& f : found) {
      const bool is_alone = has_many && is_small(f);
      std::vector<Wave>& waves = is_alone ? alone : shared;
      if (is_alone || waves.empty() || is_full(waves.back(), f.count) ||
          wave_of[f.slot] == (index)waves.size() - 1)
        waves.emplace_back();
      add(waves.back(), f);
      index& most = is_alone ? most_alone : most_shared;
      most = std::max(most, (index)waves.back().rows.size());
      wave_of[f.slot] = (index)waves.size() - 1;
    }
    std::stable_sort(alone.begin(), alone.end(),
                     [](const Wave& a, const Wave& b) { return a.rows.size() > b.rows.size(); });
  }

  static bool is_full(const Wave& wave, index count) {
    return (index)wave.rows.size() + blocks(count) > WAVE_BLOCKS;
  }

  void add(Wave& wave, const Found& f) {
    const index first = wave.rows.size(), number = wave.segments.size(), parts = blocks(f.count);
    const index height = EVEN ? (f.count + parts - 1) / parts : BLOCK;
    wave.segments.push_back({f.start, f.count, f.slot, first, parts, height, is_used[f.slot] != 0});
    for (index done = 0; done < f.count; done += height)
      wave.rows.push_back({f.start + done, least(height, f.count - done), number});
    is_used[f.slot] = 1;
  }
};

}  // namespace
