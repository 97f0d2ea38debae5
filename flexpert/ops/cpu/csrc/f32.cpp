// The fp32 kernels: AVX-512 F, BW, DQ, VL, or AVX2 and FMA.
#include <type_traits>

#include "activations.h"
#ifdef __AVX512F__
#include "block_f32.h"
#else
#include "block_f32_avx2.h"
#endif
#include "mlp_backward.h"
#include "mlp_forward.h"

extern "C" int64_t EXPORTED(flexpert_mlp_f32)(const void* call) {
  return forward(*static_cast<const ForwardCall*>(call));
}

extern "C" int64_t EXPORTED(flexpert_mlp_backward_f32)(const void* call) {
  return backward(*static_cast<const BackwardCall*>(call));
}
