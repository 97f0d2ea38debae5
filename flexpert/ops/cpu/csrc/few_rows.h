// Experts with few rows: all threads together read the weights of all such experts once, first those of the hidden
// layers, then those of the outputs. Whoever is free takes the next piece of them, and asks for it while it works on
// the one before: reading never stops, not even while threads wait for each other between the two.
#pragma once
#include <atomic>

#include "forward_rows.h"
#include "stream.h"

namespace {

class FewRows {
 public:
  FewRows(const ForwardCall& call, const std::vector<FewRowsOf>& experts)
      : c(call), experts(experts), halves(c.gated ? 2 : 1), model(blocks(c.model)), hidden(blocks(c.hidden)),
        output(blocks(c.output)), first((index)experts.size() * hidden, halves * model),
        second((index)experts.size() * output, hidden) {}

  // The most rows that an expert may have.
  static index most(const ForwardCall& c) {
    return Stream<Multiplier>::most_rows(c.amx, c.packed, c.model, c.hidden);
  }

  size_t place(Scratch* memory) {
    const index rows = experts.empty() ? 0 : experts.back().first + experts.back().count;
    const index rooms = experts.empty() ? 0 : c.threads * room_size();
    if (memory) {
      hidden_layer = memory->take<Element>(rows * hidden * BLOCK);
      room = memory->take<Element>(rooms);
    }
    return Scratch::size<Element>(rows * hidden * BLOCK) + Scratch::size<Element>(rooms);
  }

  // As many as are of use.
  index threads() const {
    constexpr index LITTLE = 1 << 17;  // bytes of weights
    return first.bytes() + second.bytes() < LITTLE ? 1 : c.threads;
  }

  // In a parallel region, all of its threads, which do not wait for each other at the end.
  void run(const Multiplier& multiply) {
    if (experts.empty()) return;
    Reader reader(*this, multiply);
    for (; reader.piece < first.pieces; reader.go_on())
      first.each(reader.piece, [&](index block) { hidden_block(block, reader); });
#pragma omp barrier
    reader.expert = -1;
    for (; reader.piece < first.pieces + second.pieces; reader.go_on())
      second.each(reader.piece - first.pieces, [&](index block) { output_block(block, reader); });
  }

 private:
  // Column blocks of all experts, `tiles` each, and the pieces that threads take.
  struct Blocks {
    index number, tiles, width, pieces;

    Blocks(index number, index tiles) : number(number), tiles(tiles) {
      constexpr index PIECE_TILES = 32;
      width = std::max<index>(1, PIECE_TILES / std::max<index>(1, tiles));
      pieces = (number + width - 1) / width;
    }
    index bytes() const { return number * tiles * TILE * (index)sizeof(Element); }

    template <typename Body>
    void each(index piece, const Body& body) const {
      for (index block = piece * width; block < least(number, (piece + 1) * width); ++block) body(block);
    }
  };

  // What a thread is at: a piece, the next one of its own, and the rows of an expert.
  struct Reader {
    Stream<Multiplier> stream;
    Asker asker;
    FewRows& work;
    index piece, next, expert = -1;

    Reader(FewRows& work, const Multiplier& multiply)
        : stream(multiply, work.room + omp_get_thread_num() * work.room_size(), work.c.packed), work(work),
          piece(work.take(asker)), next(work.take(asker)) {
      asker.lead(LEAD);
    }
    void go_on() {
      piece = next;
      next = work.take(asker);
    }
  };

  static constexpr index LEAD = 1 << 15;  // bytes asked for before they are read

  index room_size() const { return std::max(model, hidden) * TILE; }

  index take(Asker& asker) {
    const index piece = next_piece.fetch_add(1, std::memory_order_relaxed);
    if (piece < first.pieces)
      first.each(piece, [&](index block) {
        for (index half = 0; half < halves; ++half)
          asker.announce(first_weights(block, half), columns(c.hidden, block % hidden) * c.model);
      });
    else if (piece < first.pieces + second.pieces)
      second.each(piece - first.pieces, [&](index block) {
        asker.announce(second_weights(block), columns(c.output, block % output) * c.hidden);
      });
    return piece;
  }

  static index columns(index all, index block) { return least(BLOCK, all - block * BLOCK); }

  const Element* first_weights(index block, index half) const {
    const index slot = experts[block / hidden].slot, column = block % hidden;
    if (c.packed) return pointer<Element>(c.w1) + ((slot * hidden + column) * halves + half) * model * TILE;
    return pointer<Element>(c.w1) + ((slot * halves + half) * c.hidden + column * BLOCK) * c.model;
  }
  const Element* second_weights(index block) const {
    const index slot = experts[block / output].slot, column = block % output;
    if (c.packed) return pointer<Element>(c.w2) + (slot * output + column) * hidden * TILE;
    return pointer<Element>(c.w2) + (slot * c.output + column * BLOCK) * c.hidden;
  }

  void hidden_block(index block, Reader& reader) const {
    const index number = block / hidden, column = block % hidden;
    const FewRowsOf& expert = experts[number];
    if (number != reader.expert) {
      const index* unit = pointer<index>(c.unit) + expert.start;
      reader.stream.take(Rows(pointer<Element>(c.x), c.model, unit, expert.count), expert.count, c.model);
      reader.expert = number;
    }
    alignas(64) float sums[2][TILE];
    for (index half = 0; half < halves; ++half)
      reader.stream.block(first_weights(block, half), c.hidden - column * BLOCK, sums[half], reader.asker);
    Element* target = hidden_layer + expert.first * hidden * BLOCK + column * BLOCK;
    HiddenRows rows = hidden_rows(c, expert.start, expert.count, expert.slot, column, target);
    rows.tile_stride = hidden * BLOCK;
    for (index r = 0; r < expert.count; ++r) rows.step(r, sums);
  }

  void output_block(index block, Reader& reader) const {
    const index number = block / output, column = block % output;
    const FewRowsOf& expert = experts[number];
    if (number != reader.expert) {
      const Element* source = hidden_layer + expert.first * hidden * BLOCK;
      reader.stream.take(Rows(source, hidden * BLOCK, expert.count), expert.count, c.hidden);
      reader.expert = number;
    }
    alignas(64) float sums[1][TILE];
    reader.stream.block(second_weights(block), c.output - column * BLOCK, sums[0], reader.asker);
    const StoreRows rows = output_rows(c, expert.start, expert.count, expert.slot, column);
    for (index r = 0; r < expert.count; ++r) rows.step(r, sums);
  }

  const ForwardCall& c;
  const std::vector<FewRowsOf>& experts;
  const index halves, model, hidden, output;  // the sizes in blocks
  const Blocks first, second;
  std::atomic<index> next_piece{0};
  Element *hidden_layer = nullptr, *room = nullptr;
};

}  // namespace
