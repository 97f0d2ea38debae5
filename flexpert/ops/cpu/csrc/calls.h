// Calls as Python packs them: 64-bit integers, tensors by their address, null for none.
#pragma once
#include "block.h"

namespace {

// Of a call of an MLP.
enum Status : index { DONE = 0, TOO_MANY_ROWS = 1, UNIT_OUT_OF_RANGE = 2, SLOT_OUT_OF_RANGE = 3, NO_MEMORY = 4 };

struct LogitsCall {
  index tokens, experts, size, threads, x, w, logits;
};

struct RouteCall {
  index tokens, experts, top_k, scoring, normalize, limit, prioritized, threads;
  index logits, bias, score, ids, order, unit, weight, counts, slot;
  double scale;
};

struct ForwardCall {  // in the order of `FORWARD` in backend.py
  index units, rows, model, hidden, output, experts, slots, gated, activation, threads, amx, packed;
  index x, unit, weight, counts, slot, w1, b1, w2, b2, pre, y_rows, y;
};

// All of a layer for few tokens. From `router` on x, or, where that is null, from ids and weights that are given.
struct LayerCall {
  index logits_of, route, mlp;  // the functions
  index is_bf16, tokens, experts, top_k, scoring, normalize, limit, prioritized, router, bias, ids, weight;
  ForwardCall forward;  // but for what routing gives
  double scale;
};

}  // namespace
