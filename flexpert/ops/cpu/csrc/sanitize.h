// Comes before all else in a build with the sanitizers. AddressSanitizer sees plain loads and stores, but no masked
// instruction and no tile: here these first read, one by one, the bytes they are about to read or write.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

[[maybe_unused]] inline void check_bytes(const void* base, int64_t count) {
  for (int64_t i = 0; i < count; ++i) (void)static_cast<const volatile char*>(base)[i];
}

[[maybe_unused]] inline void check_lanes(uint64_t lanes, const void* base, int size) {
  for (int i = 0; i < 64; ++i)
    if (lanes >> i & 1) check_bytes(static_cast<const char*>(base) + i * size, size);
}

#ifdef __AVX2__

inline uint64_t lanes_of_signs(__m256i mask) { return _mm256_movemask_ps(_mm256_castsi256_ps(mask)); }

inline __m256 checked_maskload_ps(const float* base, __m256i mask) {
  check_lanes(lanes_of_signs(mask), base, 4);
  return _mm256_maskload_ps(base, mask);
}
inline void checked_maskstore_ps(float* base, __m256i mask, __m256 value) {
  check_lanes(lanes_of_signs(mask), base, 4);
  _mm256_maskstore_ps(base, mask, value);
}
inline void checked_half_stream_ps(float* base, __m256 value) {
  check_bytes(base, 32);
  _mm256_stream_ps(base, value);
}
inline void checked_half_stream_si256(__m256i* base, __m256i value) {
  check_bytes(base, 32);
  _mm256_stream_si256(base, value);
}

#define _mm256_maskload_ps checked_maskload_ps
#define _mm256_maskstore_ps checked_maskstore_ps
#define _mm256_stream_ps checked_half_stream_ps
#define _mm256_stream_si256 checked_half_stream_si256

#endif

#ifdef __AVX512F__

inline __m512 checked_load_ps(__mmask16 lanes, const void* base) {
  check_lanes(lanes, base, 4);
  return _mm512_maskz_loadu_ps(lanes, base);
}
inline __m512 checked_load_over_ps(__m512 other, __mmask16 lanes, const void* base) {
  check_lanes(lanes, base, 4);
  return _mm512_mask_loadu_ps(other, lanes, base);
}
inline void checked_store_ps(void* base, __mmask16 lanes, __m512 value) {
  check_lanes(lanes, base, 4);
  _mm512_mask_storeu_ps(base, lanes, value);
}
inline __m512i checked_load_epi32(__mmask16 lanes, const void* base) {
  check_lanes(lanes, base, 4);
  return _mm512_maskz_loadu_epi32(lanes, base);
}
inline void checked_store_epi32(void* base, __mmask16 lanes, __m512i value) {
  check_lanes(lanes, base, 4);
  _mm512_mask_storeu_epi32(base, lanes, value);
}
inline __m512i checked_load_epi16(__mmask32 lanes, const void* base) {
  check_lanes(lanes, base, 2);
  return _mm512_maskz_loadu_epi16(lanes, base);
}
inline void checked_store_epi16(void* base, __mmask32 lanes, __m512i value) {
  check_lanes(lanes, base, 2);
  _mm512_mask_storeu_epi16(base, lanes, value);
}
inline __m256i checked_load_half_epi16(__mmask16 lanes, const void* base) {
  check_lanes(lanes, base, 2);
  return _mm256_maskz_loadu_epi16(lanes, base);
}
inline void checked_store_half_epi16(void* base, __mmask16 lanes, __m256i value) {
  check_lanes(lanes, base, 2);
  _mm256_mask_storeu_epi16(base, lanes, value);
}
inline void checked_stream_ps(float* base, __m512 value) {
  check_bytes(base, 64);
  _mm512_stream_ps(base, value);
}
inline void checked_stream_si512(__m512i* base, __m512i value) {
  check_bytes(base, 64);
  _mm512_stream_si512(base, value);
}

#define _mm512_maskz_loadu_ps checked_load_ps
#define _mm512_mask_loadu_ps checked_load_over_ps
#define _mm512_mask_storeu_ps checked_store_ps
#define _mm512_maskz_loadu_epi32 checked_load_epi32
#define _mm512_mask_storeu_epi32 checked_store_epi32
#define _mm512_maskz_loadu_epi16 checked_load_epi16
#define _mm512_mask_storeu_epi16 checked_store_epi16
#define _mm256_maskz_loadu_epi16 checked_load_half_epi16
#define _mm256_mask_storeu_epi16 checked_store_half_epi16
#define _mm512_stream_ps checked_stream_ps
#define _mm512_stream_si512 checked_stream_si512

#endif

#ifdef __AMX_TILE__

struct TileShapes {  // as _tile_loadconfig reads them
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

inline TileShapes& tile_shapes() {
  static thread_local TileShapes shapes;
  return shapes;
}

inline void note_tile_shapes(const void* config) { std::memcpy(&tile_shapes(), config, sizeof(TileShapes)); }

inline void check_tile(int tile, const void* base, int64_t stride) {
  for (int row = 0; row < tile_shapes().rows[tile]; ++row)
    check_bytes(static_cast<const char*>(base) + row * stride, tile_shapes().bytes[tile]);
}

inline void checked_tile_loadconfig(const void* config) {
  note_tile_shapes(config);
  _tile_loadconfig(config);
}

#define _tile_loadconfig checked_tile_loadconfig
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) \
  do {                                  \
    check_tile(tile, base, stride);     \
    _tile_loadd_internal(tile, base, stride); \
  } while (0)
#undef _tile_stream_loadd
#define _tile_stream_loadd(tile, base, stride) \
  do {                                         \
    check_tile(tile, base, stride);            \
    _tile_stream_loadd_internal(tile, base, stride); \
  } while (0)
#undef _tile_stored
#define _tile_stored(tile, base, stride) \
  do {                                   \
    check_tile(tile, base, stride);      \
    _tile_stored_internal(tile, base, stride); \
  } while (0)

#endif

}  // namespace
