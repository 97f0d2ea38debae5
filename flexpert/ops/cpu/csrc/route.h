// Token choice in one call: scores, the best experts, weights, and the rows grouped by expert.
#pragma once
#include <cstdlib>
#include <cstring>

#include "calls.h"
#include "groups.h"
#include "scores.h"
#include "threads.h"

namespace {

constexpr index LITTLE_WORK = 1 << 14;  // numbers to look at, below which a team of threads costs more than it saves
constexpr double LEAST_SUM = 1e-20;    // that weights are divided by

enum RouteStatus : index { ROUTED = 0, NO_ROOM = 1, CHOICE_OUT_OF_RANGE = 2 };

inline index ranges_for(index work, index threads) { return work < LITTLE_WORK ? 1 : threads; }

// Uninitialised memory for one call, handed out in pieces that begin with a cache line.
class Room {
 public:
  explicit Room(index bytes) : data_(static_cast<char*>(std::aligned_alloc(64, bytes ? bytes : 64))), next_(data_) {}
  ~Room() { std::free(data_); }
  Room(const Room&) = delete;
  explicit operator bool() const { return data_; }

  template <typename T>
  static index size(index count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }
  template <typename T>
  T* take(index count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += size<T>(count);
    return piece;
  }

 private:
  char *data_, *next_;
};

// Tokens by urgency, equal ones in their order: four stable passes over the digits of base 256.
inline void sort_tokens(uint64_t* tokens, uint64_t* spare, index size) {
  for (int shift = 32; shift < 64; shift += 8) {
    index at[257] = {};
    for (index i = 0; i < size; ++i) ++at[(tokens[i] >> shift & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) at[digit + 1] += at[digit];
    for (index i = 0; i < size; ++i) spare[at[tokens[i] >> shift & 255]++] = tokens[i];
    std::swap(tokens, spare);
  }
}

class Router {
 public:
  Router(const RouteCall& call, index ranges)
      : c(call), ranges_(ranges), rows_(c.tokens * c.top_k), room_(bytes()) {
    if (!room_) return;
    key_ = room_.take<index>(rows_);
    groups_ = {rows_, c.experts, ranges_, key_, nullptr, c.limit, pointer<index>(c.counts),
               room_.take<index>(Groups::scratch(c.experts, ranges_))};
    tokens_ = room_.take<uint64_t>(c.prioritized ? 2 * c.tokens : 0);
    weight_ = room_.take<float>(rows_);
    row_ = room_.take<float>(ranges_ * padded(c.experts));
    rank_ = room_.take<int32_t>(ranges_ * padded(c.experts));
  }

  index run() {
    if (!room_) return NO_ROOM;
    on_threads(ranges_, [this] {
#pragma omp for schedule(static)
      for (index range = 0; range < ranges_; ++range) choose(range);
      if (c.prioritized) {
#pragma omp single
        sort_tokens(tokens_, tokens_ + c.tokens, c.tokens);
#pragma omp for schedule(static)
        for (index range = 0; range < ranges_; ++range) line_up(range);
      }
#pragma omp for schedule(static)
      for (index range = 0; range < ranges_; ++range) groups_.count(range);
#pragma omp single
      groups_.plan();
#pragma omp for schedule(static)
      for (index range = 0; range < ranges_; ++range) place(range);
    });
    return ROUTED;
  }

 private:
  index bytes() const {
    return Room::size<index>(rows_) + Room::size<index>(Groups::scratch(c.experts, ranges_)) +
           Room::size<uint64_t>(c.prioritized ? 2 * c.tokens : 0) + Room::size<float>(rows_) +
           2 * Room::size<float>(ranges_ * padded(c.experts));
  }
  index first_token(index range) const { return c.tokens * range / ranges_; }

  // Scores, choices and weights of the tokens of a range; candidates in order of arrival, or how urgent each is.
  void choose(index range) {
    const float* bias = pointer<float>(c.bias);
    float* row = row_ + range * padded(c.experts);
    for (index t = first_token(range); t < first_token(range + 1); ++t) {
      float* score = pointer<float>(c.score) + t * c.experts;
      index* ids = pointer<index>(c.ids) + t * c.top_k;
      ranking(Scoring(c.scoring), pointer<float>(c.logits) + t * c.experts, row, c.experts);
      best_experts(row, bias, c.experts, c.top_k, rank_ + range * padded(c.experts), ids);
      if (c.scoring == UNIFORM) ones(row, c.experts);
      for (index i = 0; i < c.experts; i += LANES) store(score + i, load(row + i), c.experts - i);
      weigh(row, ids, weight_ + t * c.top_k);
      if (c.prioritized)
        tokens_[t] = uint64_t(urgency(row, c.experts)) << 32 | uint64_t(t);
      else
        for (index k = 0; k < c.top_k; ++k) key_[k * c.tokens + t] = ids[k];
    }
  }

  void weigh(const float* score, const index* ids, float* weight) const {
    double sum = 0.0;
    for (index k = 0; k < c.top_k; ++k) sum += weight[k] = score[ids[k]];
    const float divisor = c.normalize ? std::max(sum, LEAST_SUM) : 1.0, scale = c.scale;
    for (index k = 0; k < c.top_k; ++k) weight[k] = weight[k] / divisor * scale;
  }

  index token_at(index place) const { return c.prioritized ? index(tokens_[place] & 0xffffffff) : place; }

  void line_up(index range) {
    for (index place = first_token(range); place < first_token(range + 1); ++place)
      for (index k = 0; k < c.top_k; ++k)
        key_[k * c.tokens + place] = pointer<index>(c.ids)[token_at(place) * c.top_k + k];
  }

  void place(index range) {
    index *order = pointer<index>(c.order), *unit = pointer<index>(c.unit), *slot = pointer<index>(c.slot);
    float* weight = pointer<float>(c.weight);
    const index first = groups_.first(range), last_start = groups_.start[c.experts - 1];
    index k = c.tokens ? first / c.tokens : 0, at = first - k * c.tokens;
    groups_.place(range, [&](index row, index rank) {
      const index t = token_at(at);
      order[row] = k * c.tokens + t;
      unit[row] = t;
      weight[row] = rank < 0 ? 0.0f : weight_[t * c.top_k + k];
      if (slot) slot[row] = rank < 0 ? row - last_start : rank;
      if (++at == c.tokens) at = 0, ++k;
    });
  }

  const RouteCall c;
  const index ranges_, rows_;
  Room room_;
  Groups groups_;
  index* key_;        // the expert of each candidate: first choices, then second ones, ...
  uint64_t* tokens_;  // by urgency
  float *weight_, *row_;
  int32_t* rank_;
};

struct AssignCall {
  index candidates, bins, threads, key, capacity, order, counts;
};

inline index assign(const AssignCall& c) {
  const index ranges = ranges_for(c.candidates, c.threads);
  Room room(Room::size<index>(Groups::scratch(c.bins, ranges)));
  if (!room) return NO_ROOM;
  const Groups groups = {c.candidates, c.bins, ranges, pointer<index>(c.key), pointer<index>(c.capacity), -1,
                         pointer<index>(c.counts), room.take<index>(Groups::scratch(c.bins, ranges))};
  index* order = pointer<index>(c.order);
  on_threads(ranges, [&] {
#pragma omp for schedule(static)
    for (index range = 0; range < ranges; ++range) groups.count(range);
#pragma omp single
    groups.plan();
#pragma omp for schedule(static)
    for (index range = 0; range < ranges; ++range) {
      index i = groups.first(range);
      groups.place(range, [&](index row, index) { order[row] = i++; });
    }
  });
  return ROUTED;
}

struct RouteBackwardCall {
  index tokens, experts, top_k, scoring, normalize, threads;
  index score, ids, order, counts, d_score, d_weight, d_logits;
  double scale;
};

// The gradient of one token's scores from those of its weights; `grad` is strided, k by k.
inline void weigh_backward(const RouteBackwardCall& c, const float* score, const index* ids, const float* grad,
                           float* d_score) {
  double sum = 0.0, mean = 0.0;
  for (index k = 0; c.normalize && k < c.top_k; ++k) {
    sum += score[ids[k]];
    mean += double(score[ids[k]]) * grad[k * c.tokens];
  }
  mean = sum >= LEAST_SUM ? mean / sum : 0.0;
  const double factor = c.normalize ? c.scale / std::max(sum, LEAST_SUM) : c.scale;
  for (index k = 0; k < c.top_k; ++k) d_score[ids[k]] += float((grad[k * c.tokens] - mean) * factor);
}

inline index route_backward(const RouteBackwardCall& c) {
  const index rows = c.tokens * c.top_k, ranges = ranges_for(c.tokens * c.experts, c.threads);
  const index *ids = pointer<index>(c.ids), *order = pointer<index>(c.order), *counts = pointer<index>(c.counts);
  const float *score = pointer<float>(c.score), *d_score = pointer<float>(c.d_score);
  const float* d_weight = pointer<float>(c.d_weight);
  Room room(Room::size<float>(rows));
  if (!room) return NO_ROOM;
  float *grad = room.take<float>(rows), *d_logits = pointer<float>(c.d_logits);
  for (index i = 0; i < rows; ++i)
    if (uint64_t(ids[i]) >= uint64_t(c.experts)) return CHOICE_OUT_OF_RANGE;
  if (d_weight) {
    std::memset(grad, 0, sizeof(float) * rows);
    index kept = 0;
    for (index expert = 0; expert < c.experts; ++expert) kept += counts[expert];
    for (index row = 0; row < least(kept, rows); ++row) {
      if (uint64_t(order[row]) >= uint64_t(rows)) return CHOICE_OUT_OF_RANGE;
      grad[order[row]] = d_weight[row];
    }
  }
  on_threads(ranges, [&] {
#pragma omp for schedule(static)
    for (index t = 0; t < c.tokens; ++t) {
      float* mine = d_logits + t * c.experts;
      if (d_score)
        std::memcpy(mine, d_score + t * c.experts, sizeof(float) * c.experts);
      else
        std::memset(mine, 0, sizeof(float) * c.experts);
      if (d_weight) weigh_backward(c, score + t * c.experts, ids + t * c.top_k, grad + t, mine);
      scores_backward(Scoring(c.scoring), score + t * c.experts, mine, c.experts);
    }
  });
  return ROUTED;
}

}  // namespace
