// The bf16 kernels: AVX-512 F, BW, DQ, VL, BF16, and AMX where the call says so; or AVX2 and FMA.
#include <type_traits>

#include "activations.h"
#ifdef __AVX512F__
#include "block_bf16.h"
#else
#include "block_bf16_avx2.h"
#endif
#include "mlp_backward.h"
#include "mlp_forward.h"
#ifdef __AVX512F__
#include "linear_score.h"
#endif

extern "C" int64_t EXPORTED(flexpert_mlp_bf16)(const void* call) {
  return forward(*static_cast<const ForwardCall*>(call));
}

extern "C" int64_t EXPORTED(flexpert_mlp_backward_bf16)(const void* call) {
  return backward(*static_cast<const BackwardCall*>(call));
}

#ifdef __AVX512F__
extern "C" int64_t flexpert_score_bf16(const void* call) { return score(*static_cast<const ScoreCall*>(call)); }

extern "C" int64_t flexpert_score_backward_bf16(const void* call) {
  return ScoreBackward(*static_cast<const ScoreBackwardCall*>(call)).run();
}
#endif
