// 2x2 pooling of two lines of an image (NHWC) into one of half the width, and its backward pass. T is float, or
// std::uint16_t for bfloat16. Values are those behind ReLU: none is negative, so that they are ordered as their bits are,
// NaN above all.
#pragma once

#include <cstdint>

namespace bmsn {

enum class Pool : int { max, mean };

// index: what the backward pass needs: which of each four the maximum is, the first of equal ones; of a mean, bit k says
// whether value k of the four is positive (or NaN). Null: not wanted.
void pool_lines(Pool kind, std::int64_t width, std::int64_t channels, const float* lines, float* out, std::uint8_t* index);
void pool_lines(Pool kind, std::int64_t width, std::int64_t channels, const std::uint16_t* lines, std::uint16_t* out,
                std::uint8_t* index);

// One of the four gets the gradient of the window, if the maximum was positive (or NaN), the others get 0; of a mean those
// that were positive get a quarter each, and pooled is not read.
void unpool_lines(Pool kind, std::int64_t width, std::int64_t channels, const float* grad, const float* pooled, const std::uint8_t* index,
                  float* lines);
void unpool_lines(Pool kind, std::int64_t width, std::int64_t channels, const std::uint16_t* grad, const std::uint16_t* pooled,
                  const std::uint8_t* index, std::uint16_t* lines);

}  // namespace bmsn
