// Softmax cross-entropy, count of correct images and gradient of the logits, as bmsn.ops.cross_entropy says.
#pragma once

#include <cstdint>

namespace bmsn {

// logits, gradient: images x classes, row-major. The loss is summed in float64 in the order of the images: it does not
// depend on the number of threads.
void cross_entropy(const float* logits, const std::int64_t* labels, std::int64_t images, std::int64_t classes, float* loss,
                   std::int64_t* correct, float* gradient, int threads);

}  // namespace bmsn
