// What convolutions share whatever computes them: images cut into strips of rows, weights packed once, what becomes of a
// result, and moments of strips joined to statistics.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "conv_forward.h"

namespace bmsn {
namespace {

// What becomes of a convolution: nothing more, moments of it, what stands behind it with frozen statistics, or ReLU's mask.
enum class End { plain, measured, scaled, masked };

template <typename T>
End end_of(const ConvBranch<T>& branch) {
    return branch.masked_by ? End::masked : branch.stats ? End::measured : branch.scale ? End::scaled : End::plain;
}

// Where the results of some rows of one image go. `moments` (3, out): a value among these, the sum of all others' distances
// from it, and of their squares; or, masked, 0, the sum, and that of the products with masked_by - mean.
template <typename T>
struct Strip {
    std::int64_t rows, width, out;
    T* y;
    float* moments;
    const float *scale, *shift;
    const T* shortcut;
    bool relu;
    const T* masked_by;
    const float* mean;
};

// A branch with its weights packed, set by set, and the moments of every strip of every image.
template <typename Kernel>
struct Prepared {
    ConvBranch<typename Kernel::Value> branch;
    std::int64_t set_size;
    Buffer<typename Kernel::Word> weights;
    Buffer<float> moments;
    typename Kernel::Convolve convolve;

    Prepared(const Kernel& kernel, const ConvBranch<typename Kernel::Value>& branch, std::int64_t strips)
        : branch(branch),
          set_size(kernel.weight_size(branch)),
          weights(make_buffer<typename Kernel::Word>(branch.sets * set_size)),
          moments(make_buffer<float>(branch.stats ? strips * 3 * branch.channels : 0)),
          convolve(kernel.convolver(branch)) {}
};

// How an image is cut: so many rows at a time, at the end perhaps fewer.
struct Strips {
    std::int64_t count, height;
};

// Mean and rstd of a group from the moments of its strips, in float64, one after the other (Chan et al. 1979). `sums`: 2 * out.
template <typename T>
void join(const ConvInput<T>& input, const Strips& strips, const ConvBranch<T>& branch, const float* moments, std::int64_t group,
          double eps, double* sums) {
    const std::int64_t out = branch.channels, all = input.images * strips.count;
    double *const mean = sums, *const squares = sums + out, pixels = 0;
    std::fill_n(sums, 2 * out, 0.);
    const float* from = moments + group * all * 3 * out;
    for (std::int64_t n = 0; n < all; ++n, from += 3 * out) {
        const std::int64_t rows = std::min(strips.height, input.height - n % strips.count * strips.height);
        const auto own = static_cast<double>(rows * input.width);
        const double share = own / (pixels + own), between = pixels * share;
        pixels += own;
        for (std::int64_t c = 0; c < out; ++c) {
            const double beyond = from[out + c] / own, delta = from[c] + beyond - mean[c];
            mean[c] += delta * share;
            squares[c] += from[2 * out + c] - from[out + c] * beyond + delta * delta * between;
        }
    }
    for (std::int64_t c = 0; c < out; ++c) {
        const double variance = squares[c] / pixels;
        branch.stats[group * out + c] = static_cast<float>(mean[c]);
        branch.stats[(input.groups + group) * out + c] = static_cast<float>(1.0 / std::sqrt((variance < 0 ? 0 : variance) + eps));
    }
}

// The line of a group's gradient from the sums of its strips. `sums`: 2 * out.
template <typename T>
void join_line(const ConvInput<T>& input, const Strips& strips, const ConvBranch<T>& branch, const float* moments, std::int64_t group,
               double* sums) {
    const std::int64_t out = branch.channels, all = input.images * strips.count;
    std::fill_n(sums, 2 * out, 0.);
    const float* from = moments + group * all * 3 * out;
    for (std::int64_t n = 0; n < all; ++n, from += 3 * out)
        for (std::int64_t k = 0; k < 2 * out; ++k) sums[k] += from[out + k];
    const auto pixels = static_cast<double>(input.images * input.height * input.width);
    for (std::int64_t c = 0; c < out; ++c) {
        const std::int64_t linear = (input.groups + group) * out + c;
        const double rstd = branch.masked_stats[linear], share = rstd / pixels;
        branch.stats[group * out + c] = static_cast<float>(sums[c] * share);
        branch.stats[linear] = static_cast<float>(sums[out + c] * rstd * rstd * share);
    }
}

// All branches of all images, by a kernel: a struct with
//   Value, Word                          of maps; of packed weights and of a thread's scratch memory
//   height, scratch_size                 rows of a strip; words, which are 0 at first
//   weight_size(branch)                  words of a packed set
//   pack_items(branch), pack(branch, weight, item, to)
//   load(x, mean, rstd, first, last, scratch)          rows of the image at x; mean: null where it is not normalised
//   convolver(branch) -> Convolve        which is called with (kernel, strip, weights, scratch)
template <typename Kernel>
void convolve_strips(const Kernel& kernel, const ConvInput<typename Kernel::Value>& input,
                     std::span<const ConvBranch<typename Kernel::Value>> branches, double eps, int threads) {
    using Value = typename Kernel::Value;
    using Word = typename Kernel::Word;
    const std::int64_t in = input.channels, images = input.groups * input.images, height = kernel.height;
    const Strips strips{(input.height + height - 1) / height, height};
    std::int64_t widest = 0;
    std::vector<Prepared<Kernel>> all;
    for (const ConvBranch<Value>& branch : branches) {
        all.emplace_back(kernel, branch, images * strips.count);
        widest = std::max(widest, branch.channels);
    }
    const auto scratches = make_buffer<Word>(threads * kernel.scratch_size);  // here, because nothing may throw in a parallel region
    const auto sums = make_buffer<double>(threads * 2 * widest);
#pragma omp parallel num_threads(threads)
    {
        for (const Prepared<Kernel>& one : all) {
            const std::int64_t items = kernel.pack_items(one.branch);
#pragma omp for schedule(static)
            for (std::int64_t item = 0; item < one.branch.sets * items; ++item) {
                const std::int64_t set = item / items;
                kernel.pack(one.branch, one.branch.weight + set * one.branch.set_stride, item % items,
                            one.weights.get() + set * one.set_size);
            }
        }
        Word* const scratch = scratches.get() + omp_get_thread_num() * kernel.scratch_size;
        double* const own_sums = sums.get() + omp_get_thread_num() * 2 * widest;
        std::fill_n(scratch, kernel.scratch_size, Word{0});
#pragma omp for schedule(static)
        for (std::int64_t n = 0; n < images; ++n) {
            const std::int64_t g = n / input.images;
            const float* const mean = input.stats ? input.stats + g * in : nullptr;
            const float* const rstd = input.stats ? input.stats + (input.groups + g) * in : nullptr;
            for (std::int64_t first = 0; first < input.height; first += height) {
                const std::int64_t last = std::min(first + height, input.height);
                kernel.load(input.x + n * input.height * input.width * in, mean, rstd, first, last, scratch);
                for (const Prepared<Kernel>& one : all) {
                    const ConvBranch<Value>& to = one.branch;
                    const std::int64_t out = to.channels, place = (n * input.height + first) * input.width * out;
                    one.convolve(kernel,
                                 {.rows = last - first,
                                  .width = input.width,
                                  .out = out,
                                  .y = to.y + place,
                                  .moments = one.moments.get() + (n * strips.count + first / height) * (to.stats ? 3 * out : 0),
                                  .scale = to.scale ? to.scale + g * out : nullptr,
                                  .shift = to.scale ? to.shift + g * out : nullptr,
                                  .shortcut = to.shortcut ? to.shortcut + place : nullptr,
                                  .relu = to.relu,
                                  .masked_by = to.masked_by ? to.masked_by + place : nullptr,
                                  .mean = to.masked_by ? to.masked_stats + g * out : nullptr},
                                 one.weights.get() + (input.weight_index ? input.weight_index[g] : 0) * one.set_size, scratch);
                }
            }
        }
        for (const Prepared<Kernel>& one : all)
            if (one.branch.stats) {
#pragma omp for schedule(static)
                for (std::int64_t g = 0; g < input.groups; ++g)
                    one.branch.masked_by ? join_line(input, strips, one.branch, one.moments.get(), g, own_sums)
                                         : join(input, strips, one.branch, one.moments.get(), g, eps, own_sums);
            }
    }
}

}  // namespace
}  // namespace bmsn
