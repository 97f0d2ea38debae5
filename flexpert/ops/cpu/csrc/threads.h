// What every call shares: addresses as numbers, and a team of threads.
#pragma once
#include <omp.h>

#include "block.h"

namespace {

template <typename T>
T* pointer(index address) {
  return reinterpret_cast<T*>(address);
}

// `body` on every thread of a team. One thread takes no team at all: after a fork the parent's threads are gone,
// and entering a parallel region would wait for them.
template <typename Body>
void on_threads(index threads, const Body& body) {
  if (threads == 1) return body();
#pragma omp parallel num_threads(threads)
  body();
}

}  // namespace
