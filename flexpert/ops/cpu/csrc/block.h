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

using Sums = float (*)[TILE];  // of blocks

// Of a product: one left operand and `parts` right ones, `apart` from each other. Where a unit can be TURNED, its left
// tiles may be [k][row], `left_step` apart; and each tile has `height` k, the last one what is left of `k`.
template <typename Element>
struct Operands {
  const Element *left, *right;
  index apart, parts, k;
  index height = BLOCK, left_step = TILE;
  bool turned = false;
  const Element *next_left = nullptr, *next_right = nullptr;  // what the next product begins with, if that is known
  const float* begin = nullptr;  // blocks of sums that a product goes on with, but on AVX2; null for zero
};

// Memory that is asked for while something else goes on: from `first`, `step` bytes further on each time; and as much
// again `twin` bytes after it, which may be 0.
struct Stretch {
  const char* first;
  index step, twin;
};

inline index blocks(index size) { return (size + BLOCK - 1) / BLOCK; }
inline index least(index a, index b) { return a < b ? a : b; }

}  // namespace
