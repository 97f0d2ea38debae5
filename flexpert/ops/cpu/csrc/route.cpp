// Routing: AVX-512 F, BW, DQ, VL, or AVX2 and FMA.
#include "logits.h"
#include "route.h"

template <typename Call>
static const Call& as(const void* call) {
  return *static_cast<const Call*>(call);
}

extern "C" int64_t EXPORTED(flexpert_route)(const void* call) {
  const auto& c = as<RouteCall>(call);
  return Router(c, ranges_for(c.tokens * c.experts, c.threads)).run();
}

extern "C" int64_t EXPORTED(flexpert_route_backward)(const void* call) {
  return route_backward(as<RouteBackwardCall>(call));
}

extern "C" int64_t EXPORTED(flexpert_assign)(const void* call) { return assign(as<AssignCall>(call)); }

extern "C" int64_t EXPORTED(flexpert_router_logits)(const void* call, int64_t is_bf16) {
  const auto& c = as<LogitsCall>(call);
  is_bf16 ? logits_of<Half>(c) : logits_of<float>(c);
  return ROUTED;
}
