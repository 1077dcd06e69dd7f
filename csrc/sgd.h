// Momentum SGD with weight decay on one row of weights, as bmsn.ops.sgd says.
#pragma once

#include <cstdint>

namespace bmsn {

struct SgdSettings {
    float lr, momentum, weight_decay;
};

// weights, velocity, copy (bfloat16; null: not wanted): `size` values, changed in place. One pass.
void sgd(const SgdSettings& settings, std::int64_t size, const float* gradient, float* weights, float* velocity,
         std::uint16_t* copy, int threads);

}  // namespace bmsn
