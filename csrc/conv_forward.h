// Convolutions (3x3 with padding 1, or 1x1; stride 1) for narrow maps in NHWC order, with what stands around them.
//
//   y[g] = conv(a[g], weight[index[g]]), and its mean and rstd,    a[g] = relu((x[g] - mean[g]) * rstd[g]) or x[g], or
//   y[g] = conv(a[g], weight[index[g]]) * scale[g] + shift[g] + shortcut[g], with or without ReLU, or
//   y[g] = conv(x[g], weight[index[g]]) where m[g] > its mean, else 0: behind ReLU, the gradient of a normalised m,
//
// for the images of statistics group g; several convolutions may read the same a. Summed in float32; statistics are those of
// the sums before rounding, taken of a few rows at a time about one of their values, and joined in the order of the rows: the
// result does not depend on the number of threads. NaN propagates.
//
// T is std::uint16_t for bfloat16: products of pairs of channels by AVX512-BF16. Or T is float: 3x3 alone, by AVX-512F and
// Winograd's F(2x2, 3x3), which computes 2x2 outputs with 16 products instead of 36 (Lavin & Gray 2015, section 4.1): an infinity
// may become NaN there.
#pragma once

#include <cstdint>
#include <span>

namespace bmsn {

// For bfloat16 the width is a multiple of 4, for float32 height and width are even.
template <typename T>
struct ConvInput {
    std::int64_t groups, images, height, width, channels;  // images of a group; with stats or in float32, channels in 16s
    const T* x;                                            // (groups, images, height, width, channels)
    const float* stats;                                    // (2, groups, channels): mean and rstd of x; null: x as it is
    const std::int32_t* weight_index;                      // (groups,); null: set 0 for all
};

template <typename T>
struct ConvBranch {
    std::int64_t kernel, channels;  // 3 or 1; of y, in 16s
    const T* weight;                // sets of (channels of y, kernel, kernel, channels of x)
    std::int64_t sets, set_stride;  // in elements
    bool transposed;                // x is the gradient of a convolution's output, and y shall be that of its input:
                                    // sets of (channels of x, kernel, kernel, channels of y), channels of x even
    T* y;                           // (groups, images, height, width, channels)
    float* stats;                   // (2, groups, channels): mean and rstd of y; null: not wanted. With masked_by: the line of
                                    // `norm_gradient` in norm_relu.h
    const float *scale, *shift;     // (groups, channels); null: y as it is. Not with stats
    const T* shortcut;              // like y; null: none
    bool relu;                      // with a scale
    const T* masked_by;             // like y: m; null: none. With stats alone
    const float* masked_stats;      // (2, groups, channels): mean and rstd of m
};

// Whether this machine has the instructions.
bool has_conv_forward(std::uint16_t);
bool has_conv_forward(float);

void conv_forward(const ConvInput<std::uint16_t>& input, std::span<const ConvBranch<std::uint16_t>> branches, double eps, int threads);
void conv_forward(const ConvInput<float>& input, std::span<const ConvBranch<float>> branches, double eps, int threads);

}  // namespace bmsn
