// A whole layer for few tokens in one call: logits, routing, experts; or experts alone, of choices that are given.
#include <algorithm>

#include "calls.h"
#include "scratch.h"
#include "threads.h"

namespace {

using Function = index (*)(const void*);
using LogitsFunction = index (*)(const void*, index);

template <typename T>
index address(T* data) {
  return reinterpret_cast<index>(data);
}

// What routing gives: the rows of the tokens' choices, by expert.
struct Rows {
  index *unit, *counts;
  float* weight;

  static size_t size(const LayerCall& c) {
    return Scratch::size<index>(c.tokens * c.top_k) + Scratch::size<index>(c.experts) +
           Scratch::size<float>(c.tokens * c.top_k);
  }
  Rows(const LayerCall& c, Scratch& memory)
      : unit(memory.take<index>(c.tokens * c.top_k)), counts(memory.take<index>(c.experts)),
        weight(memory.take<float>(c.tokens * c.top_k)) {}
};

// Choices that are given, first choices first; ids of no expert are left out.
void group(const LayerCall& c, const Rows& rows, index* next) {
  const index *ids = pointer<index>(c.ids), all = c.tokens * c.top_k;
  const float* weight = pointer<float>(c.weight);
  const auto is_present = [&](index id) { return uint64_t(id) < uint64_t(c.experts); };
  std::fill(rows.counts, rows.counts + c.experts, 0);
  for (index i = 0; i < all; ++i)
    if (is_present(ids[i])) ++rows.counts[ids[i]];
  index start = 0;
  for (index expert = 0; expert < c.experts; start += rows.counts[expert++]) next[expert] = start;
  std::fill(rows.unit + start, rows.unit + all, 0);
  std::fill(rows.weight + start, rows.weight + all, 0.0f);
  for (index k = 0; k < c.top_k; ++k)
    for (index t = 0; t < c.tokens; ++t) {
      const index i = t * c.top_k + k;
      if (!is_present(ids[i])) continue;
      const index row = next[ids[i]]++;
      rows.unit[row] = t;
      rows.weight[row] = weight[i];
    }
}

// The router's: logits, then `route`, whose other results nobody wants.
index choose(const LayerCall& c, const Rows& rows, Scratch& memory) {
  const index all = c.tokens * c.top_k, threads = c.forward.threads;
  float *logits = memory.take<float>(c.tokens * c.experts), *score = memory.take<float>(c.tokens * c.experts);
  index *ids = memory.take<index>(all), *order = memory.take<index>(all);
  const LogitsCall logits_call = {c.tokens, c.experts, c.forward.model, threads, c.forward.x, c.router, address(logits)};
  reinterpret_cast<LogitsFunction>(c.logits_of)(&logits_call, c.is_bf16);
  const RouteCall route_call = {
      c.tokens, c.experts, c.top_k, c.scoring, c.normalize, c.limit, c.prioritized, threads,
      address(logits), c.bias, address(score), address(ids), address(order), address(rows.unit),
      address(rows.weight), address(rows.counts), 0, c.scale};
  return reinterpret_cast<Function>(c.route)(&route_call);
}

index layer(const LayerCall& c) {
  const index all = c.tokens * c.top_k;
  const size_t scores = 2 * Scratch::size<float>(c.tokens * c.experts) + 2 * Scratch::size<index>(all);
  Scratch memory(Rows::size(c) + (c.router ? scores : Scratch::size<index>(c.experts)));
  if (!memory) return NO_MEMORY;
  const Rows rows(c, memory);
  if (!c.router)
    group(c, rows, memory.take<index>(c.experts));
  else if (choose(c, rows, memory) != 0)
    return NO_MEMORY;
  ForwardCall forward = c.forward;
  forward.unit = address(rows.unit);
  forward.counts = address(rows.counts);
  forward.weight = address(rows.weight);
  return reinterpret_cast<Function>(c.mlp)(&forward);
}

}  // namespace

extern "C" int64_t flexpert_layer(const void* call) { return layer(*static_cast<const LayerCall*>(call)); }
