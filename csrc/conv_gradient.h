// The gradient of a 3x3 convolution's weights (stride 1, padding 1) in bfloat16, for narrow maps in NHWC order.
//
//   dw[o,r,s,i] = sum over n, h, w of grad[n,h,w,o] * a[n,h+r-1,w+s-1,i]     (0 outside the map)
//   a = x, or relu((x - mean) * rstd)
//
// Products of pairs of pixels by AVX512-BF16, summed in float32. Images are cut into a number of parts that depends on the
// shape alone, and these are joined in their order: the result does not depend on the number of threads.
#pragma once

#include <cstdint>

namespace bmsn {

struct ConvShape {
    std::int64_t images, height, width, in_channels, out_channels;  // width even, in a multiple of 16, out of 8
};

// Whether this machine has the instructions.
bool has_conv_weight_gradient();

// x: (images, height, width, in), grad: (images, height, width, out), dw: (out, 3, 3, in); all bfloat16.
// stats: (2, in), mean and rstd of x; null: x as it is.
void conv_weight_gradient(const ConvShape& shape, const std::uint16_t* x, const float* stats, const std::uint16_t* grad,
                          std::uint16_t* dw, int threads);

}  // namespace bmsn
