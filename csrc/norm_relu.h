// BatchNorm over batch statistics, residual addition, ReLU and 2x2 pooling: what stands between two convolutions.
//
// Values lie with the channels innermost (NHWC): groups x rows x channels, rows = images * height * width of one statistics
// group. T is float, or std::uint16_t for bfloat16; all arithmetic is float32 with partial sums joined in float64.
//
//   forward   y = relu(norm(x) [+ shortcut | + norm(shortcut)]),   norm(x) = xhat [* weight[c] + bias[c]]
//             xhat = (x - mean[g,c]) * rstd[g,c]
//   backward  e = grad where y > 0, else 0
//             dx = rstd [* weight] * (e - mean(e) - xhat * mean(e * xhat)), means over the rows of the group
//             dweight = sum(e * xhat), dbias = sum(e), of all groups
//
// A group is cut into chunks of a size that depends on the channels alone, and chunks are joined in their order: the result
// depends neither on the number of threads nor (plain IEEE, no contraction) on the instruction set. NaN propagates.
#pragma once

#include <cstdint>

#include "pool_lines.h"

namespace bmsn {

struct NormShape {
    std::int64_t groups, rows, channels;
};

enum class Shortcut : int { none, plain, normalised };

// stats: (branches, 2, groups, channels), mean and rstd of x, then of the shortcut where that is normalised too.
// affine: (branches, 2, channels), weight and bias likewise; null: no affine step.
template <typename T>
struct NormForward {
    const T *x, *shortcut;  // shortcut: null without one
    T* y;
    float* stats;
    bool known;  // whether the statistics are there already
    const float* affine;
    std::uint8_t* index;  // not null: y is the 2x2 pooled map, and this is what `pool_lines` leaves for the backward pass
    Pool pool;
    std::int64_t width;  // of a map, even; read with an index
};

// The second half alone, of statistics that are there: (2, groups, channels), mean and rstd.
template <typename T>
struct NormApply {
    const T *x, *shortcut;
    const float *stats, *shortcut_stats;
    const float *affine, *shortcut_affine;  // (2, channels), or null
    T *full, *pooled;  // the result, or `x` itself to replace it; the result after 2x2 pooling; null: not wanted
    std::uint8_t* index;  // as in NormForward; null: not wanted
    Pool pool;
    std::int64_t width;  // of a map, even; read where pooled is wanted
};

template <typename T>
struct NormBackward {
    const T *grad, *y, *x, *shortcut;  // y: read with a shortcut and max-pooling; shortcut: read where it was normalised
    const float *stats, *affine;
    T *dx, *dshortcut;  // dshortcut: null without a shortcut
    float* daffine;     // like affine
    const std::uint8_t* index;  // as in the forward pass; grad and y are then those of the pooled map
    Pool pool;
    std::int64_t width;
};

// The last step of the backward pass alone, without a shortcut: dx = rstd * e - line[0] - (x - mean) * line[1].
template <typename T>
struct NormGradient {
    const T *e, *x;
    const float *stats, *line;  // (2, groups, channels): mean and rstd of x; rstd * mean(e) and rstd^2 * mean(e * xhat)
    T* dx;                      // may be e
};

void norm_relu(const NormShape& shape, Shortcut kind, const NormForward<float>& call, double eps, int threads);
void norm_relu(const NormShape& shape, Shortcut kind, const NormForward<std::uint16_t>& call, double eps, int threads);
void batch_statistics(const NormShape& shape, const float* x, float* stats, double eps, int threads);
void batch_statistics(const NormShape& shape, const std::uint16_t* x, float* stats, double eps, int threads);
void norm_add_relu_pool(const NormShape& shape, Shortcut kind, const NormApply<float>& call, int threads);
void norm_add_relu_pool(const NormShape& shape, Shortcut kind, const NormApply<std::uint16_t>& call, int threads);
void norm_relu_backward(const NormShape& shape, Shortcut kind, const NormBackward<float>& call, int threads);
void norm_relu_backward(const NormShape& shape, Shortcut kind, const NormBackward<std::uint16_t>& call, int threads);
void norm_gradient(const NormShape& shape, const NormGradient<float>& call, int threads);
void norm_gradient(const NormShape& shape, const NormGradient<std::uint16_t>& call, int threads);

}  // namespace bmsn
