// The order of work: experts in waves, rows of an expert in blocks; and the memory that holds packed operands.
//
// A wave is a run of experts with enough rows to keep all threads busy, few enough for its packed rows to stay
// near the cores, and no two that share a weight slot, so that tasks of one wave never write the same gradient.
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "block.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace {

constexpr index WAVE_BLOCKS = 32;

enum Status : index { DONE = 0, TOO_MANY_ROWS = 1, UNIT_OUT_OF_RANGE = 2, SLOT_OUT_OF_RANGE = 3, NO_MEMORY = 4 };

struct Segment {
  index start, count;          // its rows
  index slot;                  // its weights
  index first_block, blocks;   // its row blocks in the wave
  bool again;                  // an earlier wave has written gradients of this slot
};

struct RowBlock {
  index start, count, segment;
};

struct Wave {
  std::vector<Segment> segments;
  std::vector<RowBlock> rows;
};

struct Plan {
  std::vector<Wave> waves;
  std::vector<char> is_used;      // per slot
  std::vector<RowBlock> idle;     // rows of absent experts and past the total; of no segment
  index most_blocks = 0;
  index status;

  Plan(index units, index rows, index experts, index slots, const index* unit, const index* counts,
       const index* slot_of)
      : is_used(slots, 0), status(fill(units, rows, experts, unit, counts, slot_of)) {}

 private:
  index fill(index units, index rows, index experts, const index* unit, const index* counts,
             const index* slot_of) {
    const index slots = is_used.size();
    std::vector<index> wave_of(slots, -1);
    index start = 0;
    for (index expert = 0; expert < experts; ++expert) {
      const index count = counts[expert], slot = slot_of ? slot_of[expert] : expert;
      if (count < 0 || count > rows - start) return TOO_MANY_ROWS;
      if (slot >= slots && count) return SLOT_OUT_OF_RANGE;
      if (count && slot >= 0) {
        for (index i = start; i < start + count; ++i)
          if (unit[i] < 0 || unit[i] >= units) return UNIT_OUT_OF_RANGE;
        if (waves.empty() || is_full(waves.back(), count) || wave_of[slot] == (index)waves.size() - 1)
          waves.emplace_back();
        add(waves.back(), start, count, slot);
        wave_of[slot] = (index)waves.size() - 1;
      } else if (count) {
        idle.push_back({start, count, -1});
      }
      start += count;
    }
    if (start < rows) idle.push_back({start, rows - start, -1});
    return DONE;
  }

  static bool is_full(const Wave& wave, index count) {
    return (index)wave.rows.size() + blocks(count) > WAVE_BLOCKS;
  }

  void add(Wave& wave, index start, index count, index slot) {
    const index first = wave.rows.size(), number = wave.segments.size();
    wave.segments.push_back({start, count, slot, first, blocks(count), is_used[slot] != 0});
    for (index done = 0; done < count; done += BLOCK)
      wave.rows.push_back({start + done, least(BLOCK, count - done), number});
    is_used[slot] = 1;
    if ((index)wave.rows.size() > most_blocks) most_blocks = wave.rows.size();
  }
};

// Aligned memory on huge pages. One buffer of moderate size is kept from call to call, as its pages are dear;
// a call that finds it taken, or needs more, gets memory of its own.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_(bytes) {
    owns_kept_ = bytes <= KEPT_BYTES && kept_lock().try_lock();
    if (!owns_kept_) {
      data_ = allocate(bytes);
    } else if (kept_size() < bytes) {
      std::free(kept());
      kept() = allocate(bytes);
      kept_size() = kept() ? bytes : 0;
    }
    if (owns_kept_) data_ = kept();
    if (data_) next_ = static_cast<char*>(data_);
    poison();
  }
  ~Scratch() {
    if (owns_kept_)
      kept_lock().unlock();
    else
      std::free(data_);
  }
  Scratch(const Scratch&) = delete;

  explicit operator bool() const { return data_ != nullptr; }

  template <typename T>
  T* take(index count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += size<T>(count);
    unpoison(result, count * sizeof(T));
    return result;
  }

  template <typename T>
  static size_t size(index count) {
    return (count * sizeof(T) + 63) / 64 * 64 + GAP;
  }

 private:
  static constexpr size_t KEPT_BYTES = size_t(64) << 20, PAGE = size_t(2) << 20;

#ifdef __SANITIZE_ADDRESS__  // buffers begin as NaN and have gaps between them, which nobody may touch
  static constexpr size_t GAP = 256;
  void poison() {
    const size_t all = owns_kept_ ? kept_size() : bytes_;
    if (!data_) return;
    unpoison(data_, all);
    std::memset(data_, 0xff, all);
    __asan_poison_memory_region(data_, all);
  }
  static void unpoison(void* data, size_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
  static constexpr size_t GAP = 0;
  static void poison() {}
  static void unpoison(void*, size_t) {}
#endif

  static void* allocate(size_t bytes) {
    void* data = nullptr;
    const size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    if (posix_memalign(&data, PAGE, whole ? whole : PAGE)) return nullptr;
    madvise(data, whole, MADV_HUGEPAGE);
    return data;
  }
  static std::mutex& kept_lock() {
    static std::mutex lock;
    return lock;
  }
  static void*& kept() {
    static void* data = nullptr;
    return data;
  }
  static size_t& kept_size() {
    static size_t size = 0;
    return size;
  }

  size_t bytes_;
  bool owns_kept_;
  void* data_ = nullptr;
  char* next_ = nullptr;
};

}  // namespace
