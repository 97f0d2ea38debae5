// What each thread computes alone, handed out in order. A thread may take its next one before it is done with the one it
// has, so that it can ask for what that reads.
#pragma once
#include <atomic>

#include "block.h"

namespace {

class Turns {
 public:
  explicit Turns(index number) : number(number) {}

  // -1 where none is left.
  index take() {
    const index i = next.fetch_add(1, std::memory_order_relaxed);
    return i < number ? i : -1;
  }

 private:
  const index number;
  std::atomic<index> next{0};
};

// A thread's.
class Turn {
 public:
  explicit Turn(Turns& turns) : turns(turns) {}

  // The one to compute now; -1 where none is left.
  index begin() {
    const index now = following();
    has_taken = false;
    return now;
  }

  // The one after it, which no other thread gets from then on: to be asked as late as will do.
  index following() {
    if (!has_taken) taken = turns.take();
    has_taken = true;
    return taken;
  }

 private:
  Turns& turns;
  index taken = -1;
  bool has_taken = false;
};

}  // namespace
