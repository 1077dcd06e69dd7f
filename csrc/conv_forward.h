// Convolutions (3x3 with padding 1, or 1x1; stride 1) in bfloat16 for narrow maps in NHWC order, with what stands around them.
//
//   y[g] = conv(a[g], weight[index[g]]), and its mean and rstd,    a[g] = relu((x[g] - mean[g]) * rstd[g]) or x[g], or
//   y[g] = conv(a[g], weight[index[g]]) * scale[g] + shift[g] + shortcut[g], with or without ReLU, or
//   y[g] = conv(x[g], weight[index[g]]) where m[g] > its mean, else 0: behind ReLU, the gradient of a normalised m,
//
// for the images of statistics group g; several convolutions may read the same a. Products of pairs of channels by
// AVX512-BF16, summed in float32; statistics are those of the sums before rounding, taken of a few rows at a time about one of
// their values, and joined in the order of the rows: the result does not depend on the number of threads. NaN propagates.
#pragma once

#include <cstdint>
#include <span>

namespace bmsn {

struct ConvInput {
    std::int64_t groups, images, height, width, channels;  // images of a group; width in fours; with stats, channels in 16s
    const std::uint16_t* x;                                // (groups, images, height, width, channels)
    const float* stats;                                    // (2, groups, channels): mean and rstd of x; null: x as it is
    const std::int32_t* weight_index;                      // (groups,); null: set 0 for all
};

struct ConvBranch {
    std::int64_t kernel, channels;   // 3 or 1; of y, in 16s
    const std::uint16_t* weight;     // sets of (channels of y, kernel, kernel, channels of x)
    std::int64_t sets, set_stride;   // in elements
    bool transposed;                 // x is the gradient of a convolution's output, and y shall be that of its input:
                                     // sets of (channels of x, kernel, kernel, channels of y), channels of x even
    std::uint16_t* y;                // (groups, images, height, width, channels)
    float* stats;                    // (2, groups, channels): mean and rstd of y; null: not wanted. With masked_by: the line of
                                     // `norm_gradient` in norm_relu.h
    const float *scale, *shift;      // (groups, channels); null: y as it is. Not with stats
    const std::uint16_t* shortcut;   // like y; null: none
    bool relu;                       // with a scale
    const std::uint16_t* masked_by;  // like y: m; null: none. With stats alone
    const float* masked_stats;       // (2, groups, channels): mean and rstd of m
};

// Whether this machine has the instructions.
bool has_conv_forward();

void conv_forward(const ConvInput& input, std::span<const ConvBranch> branches, double eps, int threads);

}  // namespace bmsn
