// The unit of all work: blocks of 32 x 32, and tiles of 32 x 32 packed operands in the order a kernel reads.
//
// A left operand is [row block][k block] tiles of 32 rows x 32 k; a right one is [column block][k block] tiles
// of 32 k x 32 columns. Packing takes pointers to 32 source rows (null: a row of zeros), the first element to
// read of each and how many; what lies beyond is zero, never read.
#pragma once
#include <cstdint>

namespace {

using index = int64_t;

constexpr index BLOCK = 32;
constexpr index TILE = BLOCK * BLOCK;

inline index blocks(index size) { return (size + BLOCK - 1) / BLOCK; }
inline index least(index a, index b) { return a < b ? a : b; }

// Packed rows a product asks for while it runs, so that they are near when their turn comes: per k block,
// `lines` cache lines from `next` on.
struct Ahead {
  const char* next = nullptr;
  index lines = 0;

  // Share `part` of `parts` of the `count` left tiles at `tiles`.
  template <typename T>
  Ahead(const T* tiles, index count, index part, index parts) {
    const index bytes = TILE * sizeof(T);
    lines = (bytes / 64 + parts - 1) / parts;
    next = reinterpret_cast<const char*>(tiles) + part * lines * 64 * count;
  }
  Ahead() = default;

  void step() {
    for (index i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

}  // namespace
