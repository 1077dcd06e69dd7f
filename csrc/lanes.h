// 16 float32 values at a time, for the files that use AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define BMSN_AVX512 __attribute__((target("avx512f")))
#define BMSN_AVX512_INLINE inline __attribute__((always_inline, target("avx512f")))

namespace bmsn {
namespace {

constexpr std::int64_t kLanes = 16;

// (all lanes of a mask, because GCC 12 warns of the plain intrinsics' undefined ones)
constexpr __mmask16 kAll = 0xffff;

BMSN_AVX512_INLINE __m512 relu(__m512 x) { return _mm512_maskz_max_ps(kAll, _mm512_setzero_ps(), x); }  // a NaN stays

}  // namespace
}  // namespace bmsn
