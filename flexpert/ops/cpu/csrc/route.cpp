// Routing and its noise, and rows to and from their units: AVX-512 F, BW, DQ, VL, or AVX2 and FMA.
#include "buffers.h"
#include "logits.h"
#include "noise.h"
#include "route.h"
#include "rows.h"

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

extern "C" int64_t EXPORTED(flexpert_gather_rows)(const void* call, int64_t is_bf16) {
  const auto& c = as<RowsCall>(call);
  return is_bf16 ? Rows<Half>(c).gather() : Rows<float>(c).gather();
}

extern "C" int64_t EXPORTED(flexpert_sum_rows)(const void* call, int64_t is_bf16) {
  const auto& c = as<RowsCall>(call);
  return is_bf16 ? Rows<Half>(c).sum() : Rows<float>(c).sum();
}

extern "C" int64_t EXPORTED(flexpert_row_dots)(const void* call, int64_t is_bf16) {
  const auto& c = as<RowsCall>(call);
  return is_bf16 ? Rows<Half>(c).dots() : Rows<float>(c).dots();
}

extern "C" int64_t EXPORTED(flexpert_uniform)(const void* call) {
  uniform(as<UniformCall>(call));
  return ROUTED;
}

extern "C" int64_t EXPORTED(flexpert_fill_buffers)(const void* call, int64_t is_bf16) {
  const auto& c = as<BuffersCall>(call);
  return is_bf16 ? Buffers<Half>(c).fill() : Buffers<float>(c).fill();
}

extern "C" int64_t EXPORTED(flexpert_read_buffers)(const void* call, int64_t is_bf16) {
  const auto& c = as<BuffersCall>(call);
  return is_bf16 ? Buffers<Half>(c).read() : Buffers<float>(c).read();
}
