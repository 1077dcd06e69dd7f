// What the forward and the backward sweeps share: blocks of columns, and what one chunk reads of a normalised map.
// Source files include it whose functions inline everything here for the instruction set they are compiled for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "norm_lanes.h"
#include "norm_relu.h"
#include "partition.h"

namespace bmsn {
namespace {

struct Block {
    Pair at[kPairs];
};

// The values of a block's lanes out of one value for each channel.
template <typename T>
BMSN_INLINE Block spread(const float* values, std::int64_t channels, std::int64_t column) {
    float lanes[kBlock];
    for (std::int64_t lane = 0, c = column % channels; lane < kBlock; c = 0) {
        const std::int64_t run = std::min(channels - c, kBlock - lane);
        std::copy_n(values + c, run, lanes + lane);
        lane += run;
    }
    Block block;
    for (std::int64_t j = 0; j < kPairs; ++j) block.at[j] = Lanes<T>::from_memory_order(load(lanes + j * kPair));
    return block;
}

// Adds a block's lanes to their channels' totals.
template <typename T>
BMSN_INLINE void fold(const Block& block, std::int64_t channels, std::int64_t column, double* totals) {
    float lanes[kBlock];
    for (std::int64_t j = 0; j < kPairs; ++j) store(lanes + j * kPair, Lanes<T>::to_memory_order(block.at[j]));
    for (std::int64_t lane = 0, c = column % channels; lane < kBlock; c = 0) {
        const std::int64_t run = std::min(channels - c, kBlock - lane);
        for (std::int64_t i = 0; i < run; ++i) totals[c + i] += static_cast<double>(lanes[lane + i]);
        lane += run;
    }
}

// Calls body(j, offset, count) for the pairs of one column of blocks, from the first row to the last.
template <typename Body>
BMSN_INLINE void sweep(const Chunk& chunk, std::int64_t column, Body body) {
    const std::int64_t values = chunk.rows * chunk.channels, whole = values / chunk.width * chunk.width;
    for (std::int64_t at = column; at < whole; at += chunk.width) {
#pragma GCC unroll 2
        for (std::int64_t j = 0; j < kPairs; ++j) body(j, at + j * kPair, kPair);
    }
    for (std::int64_t j = 0; j < kPairs; ++j) {
        const std::int64_t at = whole + column + j * kPair;
        if (at < values) body(j, at, std::min(values - at, kPair));
    }
}

BMSN_INLINE Block operator+(const Block& x, const Block& y) {
    Block sum;
    for (std::int64_t j = 0; j < kPairs; ++j) sum.at[j] = x.at[j] + y.at[j];
    return sum;
}

// What one chunk reads of x, or of the shortcut where that is normalised: the values and one number a channel.
// norm(x) = (x - mean) * scale + shift; shift is null without an affine step.
template <typename T>
struct Branch {
    const T* x;
    const float *mean, *scale, *shift;
};

// scale is rstd, with an affine step rstd * weight, and shift its bias.
class Normalisation {
  public:
    // stats: (2, groups, channels), mean and rstd; affine: (2, channels), weight and bias, or null.
    Normalisation(const NormShape& shape, const float* stats, const float* affine)
        : channels_(shape.channels), mean_(stats), rstd_(stats + shape.groups * shape.channels),
          shift_(affine ? affine + shape.channels : nullptr) {
        if (!affine) return;
        products_.resize(static_cast<std::size_t>(shape.groups * channels_));
        for (std::int64_t cell = 0; cell < shape.groups * channels_; ++cell)
            products_[static_cast<std::size_t>(cell)] = rstd_[cell] * affine[cell % channels_];
    }

    const float* rstd() const { return rstd_; }
    const float* scale() const { return shift_ ? products_.data() : rstd_; }

    template <typename T>
    Branch<T> at(const T* x, std::int64_t group, std::int64_t offset) const {
        return {x + offset, mean_ + group * channels_, scale() + group * channels_, shift_};
    }

  private:
    std::int64_t channels_;
    const float *mean_, *rstd_, *shift_;
    std::vector<float> products_;
};

}  // namespace
}  // namespace bmsn
