#include "sgd.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "clones.h"

namespace bmsn {
namespace {

constexpr std::int64_t kChunk = 16384;  // values that a thread takes at a time

// To bfloat16: nearest, ties to even; a NaN stays one.
inline std::uint16_t rounded(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    return static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : up);
}

BMSN_FMA_CLONES void update(const SgdSettings& settings, std::int64_t size, const float* __restrict gradient,
                            float* __restrict weights, float* __restrict velocity) {
    const float lr = -settings.lr, momentum = settings.momentum, weight_decay = settings.weight_decay;
    for (std::int64_t k = 0; k < size; ++k) {
        const float decayed = std::fma(weight_decay, weights[k], gradient[k]);
        velocity[k] = momentum * velocity[k] + decayed;  // two roundings (-ffp-contract=off), as torch's mul_ and add_
        weights[k] = std::fma(lr, velocity[k], weights[k]);
    }
}

BMSN_FMA_CLONES void round_all(std::int64_t size, const float* __restrict weights, std::uint16_t* __restrict copy) {
    for (std::int64_t k = 0; k < size; ++k) copy[k] = rounded(weights[k]);
}

}  // namespace

void sgd(const SgdSettings& settings, std::int64_t size, const float* gradient, float* weights, float* velocity,
         std::uint16_t* copy, int threads) {
    const std::int64_t chunks = (size + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t at = chunk * kChunk, count = std::min(kChunk, size - at);
        update(settings, count, gradient + at, weights + at, velocity + at);
        if (copy) round_all(count, weights + at, copy + at);  // out of the first-level cache
    }
}

}  // namespace bmsn
