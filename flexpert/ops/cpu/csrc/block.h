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

inline index blocks(index size) { return (size + BLOCK - 1) / BLOCK; }
inline index least(index a, index b) { return a < b ? a : b; }

}  // namespace
