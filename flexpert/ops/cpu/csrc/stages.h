// Stages of work that all threads of a region take tasks from, one stage after the other, without a barrier between
// them: a task waits only for the stages that it needs. Where these lie two stages back, nobody waits for a thread
// that is slower or began its last task later.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <initializer_list>
#include <vector>

#include "block.h"

namespace {

class Stages {
 public:
  explicit Stages(index number) : stages(number) {}

  // `body` of each number below `count`, after all tasks of the stages in `needs`; a negative one is none. Each thread
  // calls the same stages in the same order.
  template <typename Body>
  void run(index stage, index count, std::initializer_list<index> needs, const Body& body) {
    Stage& own = stages[stage];
    if (count <= 0) own.is_over.store(true, std::memory_order_release);
    index task = own.next.fetch_add(1, std::memory_order_relaxed);
    if (task < count)
      for (const index needed : needs)
        if (needed >= 0) wait(stages[needed]);
    for (; task < count; task = own.next.fetch_add(1, std::memory_order_relaxed)) {
      body(task);
      if (own.done.fetch_add(1, std::memory_order_acq_rel) + 1 == count)
        own.is_over.store(true, std::memory_order_release);
    }
  }

 private:
  struct alignas(64) Stage {
    std::atomic<index> next{0}, done{0};
    std::atomic<bool> is_over{false};
  };

  static void wait(const Stage& stage) {
    constexpr index PATIENCE = 1 << 14;  // where threads outnumber processors, the one waited for may not run
    for (index spins = 0; !stage.is_over.load(std::memory_order_acquire); ++spins)
      if (spins < PATIENCE)
        _mm_pause();
      else
        sched_yield();
  }

  std::vector<Stage> stages;
};

}  // namespace
