// Seconds of the parts of a layer, by the kernels' own functions: what the time of the whole is explained by. Compiled
// for the blocks of one dtype, with the flags of the library.
#include "moves.h"
#include "products.h"

#define PART(name) \
  extern "C" double part_##name(const Case* c, int64_t how) { return name(*c, how); }

PART(first_product)
PART(second_product)
PART(hidden_gradient)
PART(row_gradient)
PART(second_gradient)
PART(first_gradient)
PART(pack_first)
PART(pack_second)
PART(pack_second_of_k)
PART(pack_first_of_k)
PART(pack_tokens)
PART(pack_gradients)
PART(sums)

extern "C" double part_read(const char* from, int64_t bytes, int64_t threads) {
  return read_memory(from, bytes, threads);
}
extern "C" double part_fill(char* to, int64_t bytes, int64_t threads) { return fill_memory(to, bytes, threads); }
