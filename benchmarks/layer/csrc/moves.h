// What a layer moves beside its products: packing of weights and rows, sums per token, plain reads and fills.
#pragma once
#include "case.h"

namespace {

// Right operands of weights stored [columns][size of k], as forward packs them.
inline double pack_forward(const Case& c, bool far, index matrices, index columns, index size, index weights) {
  return timed(c, [&](const Group& group, Share share, const Multiplier&, const Desk& desk) {
    const index all = matrices * blocks(columns), depth = blocks(size);
    for (index i = share.begin(all); i < share.end(all); ++i) {
      const Element* matrix = pointer<Element>(weights) + (group.slot * matrices + i % matrices) * columns * size;
      pack_columns(desk.made + i % 8 * depth * TILE, far ? matrix : desk.left, far ? columns : BLOCK, size,
                   far ? i / matrices * BLOCK : 0);
    }
  });
}

// Right operands of weights stored [size of k][columns], as backward packs them; of those near a few columns at a time.
inline double pack_backward(const Case& c, bool far, index size, index columns, index weights) {
  return timed(c, [&](const Group& group, Share share, const Multiplier&, const Desk& desk) {
    const index all = blocks(columns), width = far ? WIDEST_OF_K : 4, end = share.end(all);
    const Element* matrix = far ? pointer<Element>(weights) + group.slot * size * columns : desk.left;
    for (index i = share.begin(all); i < end; i += width) {
      const index number = least(width, end - i);
      pack_columns_of_k(desk.made, blocks(size), matrix, far ? columns : number * BLOCK, size, far ? i : 0, number);
    }
  });
}

inline double pack_first(const Case& c, bool far) {
  return pack_forward(c, far, c.halves(), c.hidden, c.model, c.w1);
}
inline double pack_second(const Case& c, bool far) {
  return pack_forward(c, far, 1, c.model, c.hidden, c.w2);
}
inline double pack_second_of_k(const Case& c, bool far) {
  return pack_backward(c, far, c.model, c.hidden, c.w2);
}
inline double pack_first_of_k(const Case& c, bool far) {
  return pack_backward(c, far, c.halves() * c.hidden, c.model, c.w1);
}

// Tokens as left operands of the forward pass.
inline double pack_tokens(const Case& c, bool far) {
  return timed(c, [&](const Group& group, Share share, const Multiplier&, const Desk& desk) {
    for (index j = share.begin(group.blocks); j < share.end(group.blocks); ++j)
      pack_rows(desk.made + j * blocks(c.model) * TILE, pointer<Element>(c.x), c.model,
                pointer<index>(c.unit) + (far ? group.first(j) : 0), group.in(j));
  });
}

// Gradients of results and tokens as operands of the backward pass.
inline double pack_gradients(const Case& c, bool far) {
  const index area = c.tiles * TILE;
  return timed(c, [&](const Group& group, Share share, const Multiplier&, const Desk& desk) {
    for (index j = share.begin(group.blocks); j < share.end(group.blocks); ++j) {
      const index* units = pointer<index>(c.unit) + (far ? group.first(j) : 0);
      const Rows dy(pointer<Element>(c.grad), c.model, units, group.in(j));
      const Rows x(pointer<Element>(c.x), c.model, units, group.in(j));
      for (index k = 0; k < blocks(c.model); ++k) {
        const index at = k * BLOCK, width = c.model - at, tile = (j * blocks(c.model) + k) * TILE;
        dy.ask(at + AHEAD);
        x.ask(at + AHEAD);
        pack_left(desk.made + tile, dy.at, at, width);
        pack_right(desk.made + area + tile, x.at, at, width);
        if (!TURNED) pack_left_transposed(desk.made + 2 * area + tile, dy.at, at, width);
      }
    }
  });
}

// Results of rows to tokens, weighted; or their gradients.
inline double sums(const Case& c, bool weighted) {
  const Plan plan(c.units, c.rows, c.experts, c.experts, pointer<index>(c.unit), pointer<index>(c.counts),
                  nullptr, c.threads);
  double begin = 0;
  on_threads(c.threads, [&] {
#pragma omp barrier
#pragma omp master
    begin = omp_get_wtime();
    combine(plan, pointer<Element>(c.y_rows), weighted ? pointer<float>(c.weight) : nullptr,
            pointer<Element>(c.y), c.units, c.model);
  });
  return omp_get_wtime() - begin;
}

// A read of whole lines in order, which asks for those that follow.
inline double read_memory(const char* from, index bytes, index threads) {
  constexpr index SOON = 1024;
  __m512i total = _mm512_setzero_si512();
  double begin = 0;
  on_threads(threads, [&] {
    __m512i sum = _mm512_setzero_si512();
#pragma omp barrier
#pragma omp master
    begin = omp_get_wtime();
#pragma omp for schedule(static)
    for (index i = 0; i < bytes / 64; ++i) {
      _mm_prefetch(from + i * 64 + SOON, _MM_HINT_T0);
      sum = _mm512_xor_si512(sum, _mm512_loadu_si512(from + i * 64));
    }
#pragma omp critical
    total = _mm512_xor_si512(total, sum);
  });
  const double seconds = omp_get_wtime() - begin;
  return seconds + (_mm512_reduce_and_epi64(total) == 0x5eed ? 1e-9 : 0);  // so that nobody leaves the read out
}

inline double fill_memory(char* to, index bytes, index threads) {
  const __m512i value = _mm512_set1_epi16(0x3f80);
  double begin = 0;
  on_threads(threads, [&] {
#pragma omp barrier
#pragma omp master
    begin = omp_get_wtime();
#pragma omp for schedule(static)
    for (index i = 0; i < bytes / 64; ++i) _mm512_storeu_si512(to + i * 64, value);
  });
  return omp_get_wtime() - begin;
}

}  // namespace
