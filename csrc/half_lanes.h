// 16 bfloat16 values at a time as AVX512-BF16 takes them, for the files that use its products.
#pragma once

#include "lanes.h"

#define BMSN_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define BMSN_BF16_INLINE inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace bmsn {
namespace {

using Half = std::uint16_t;

BMSN_BF16_INLINE __m512i load_low(const Half* from) {
    return _mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

BMSN_BF16_INLINE __m512i load_high(const Half* from) { return _mm512_maskz_slli_epi32(kAll, load_low(from), 16); }

BMSN_BF16_INLINE __m512 widen(const Half* from) { return _mm512_castsi512_ps(load_high(from)); }

BMSN_BF16_INLINE void narrow(Half* to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// relu((x - mean) * rstd) of one row of pixels, of `channels` in 16s, into another.
BMSN_BF16_INLINE void normalise_row(const Half* from, std::int64_t size, std::int64_t channels, const float* mean, const float* rstd,
                                    Half* to) {
    for (std::int64_t c = 0; c < channels; c += kLanes) {
        const __m512 m = _mm512_loadu_ps(mean + c), r = _mm512_loadu_ps(rstd + c);
        for (std::int64_t p = c; p < size; p += channels) narrow(to + p, relu(_mm512_mul_ps(_mm512_sub_ps(widen(from + p), m), r)));
    }
}

}  // namespace
}  // namespace bmsn
