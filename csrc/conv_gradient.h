// The gradient of a 3x3 convolution's weights (stride 1, padding 1), for narrow maps in NHWC order.
//
//   dw[o,r,s,i] = sum over n, h, w of grad[n,h,w,o] * a[n,h+r-1,w+s-1,i]     (0 outside the map)
//   a = x, or relu((x - mean) * rstd)
//
// In bfloat16 products of pairs of pixels by AVX512-BF16, summed in float32; in float32 AVX-512F and Winograd's F(3x3, 2x2), 16
// products for 2x2 pixels instead of 36 (see conv_forward.h). Images are cut into a number of parts that depends on the
// shape alone, and these are joined in their order: the result does not depend on the number of threads.
#pragma once

#include <cstdint>

namespace bmsn {

struct ConvShape {
    // bfloat16: width even, in a multiple of 16, out of 8; float32: height and width even, in and out multiples of 16
    std::int64_t images, height, width, in_channels, out_channels;
};

// Whether this machine has the instructions.
bool has_conv_weight_gradient(std::uint16_t);
bool has_conv_weight_gradient(float);

// x: (images, height, width, in), grad: (images, height, width, out), dw: (out, 3, 3, in).
// stats: (2, in), mean and rstd of x; null: x as it is.
void conv_weight_gradient(const ConvShape& shape, const std::uint16_t* x, const float* stats, const std::uint16_t* grad,
                          std::uint16_t* dw, int threads);
void conv_weight_gradient(const ConvShape& shape, const float* x, const float* stats, const float* grad, float* dw, int threads);

}  // namespace bmsn
