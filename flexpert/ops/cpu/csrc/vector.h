// Sixteen floats at a time, in the words that all kernels are written in: by AVX-512 in units compiled for it, else
// by AVX2. What a unit exports is named after the instructions.
#pragma once

#ifdef __AVX512F__
#include "vector_avx512.h"
#define EXPORTED(name) name
#else
#include "vector_avx2.h"
#define EXPORTED(name) name##_avx2
#endif
