// The memory of one call: packed operands, and what lies between the parts of a layer.
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "block.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace {

// Aligned memory on huge pages. One buffer of moderate size is kept from call to call, as its pages are dear;
// a call that finds it taken, or needs more, gets memory of its own.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_(bytes) {
    owns_kept_ = bytes <= KEPT_BYTES && kept_lock().try_lock();
    if (!owns_kept_) {
      data_ = allocate(bytes);
    } else if (!kept() || kept_size() < bytes) {  // a first call may need nothing
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
