// Training batches: gather, crop from a padded image, flip, normalise by table, cast, in one pass. Padding is 0 after
// normalisation.
#pragma once

#include <cstdint>

namespace bmsn {

struct BatchShape {
    std::int64_t num_images, height, width, channels;
};

// out[i, y, x, c] = table[v, c], v = image[indices[i]][y + top - padding, column + left - padding, c], 0 where that lies
// outside the image; column = width - 1 - x where flips[i], else x; (top, left) = offsets[i].
// images: uint8 NHWC. indices, flips: num_images. offsets: num_images x 2. table: 256 x channels. out: NHWC.
void augment(const std::uint8_t* images, BatchShape shape, const std::int64_t* indices, const std::int64_t* offsets,
             const std::int64_t* flips, std::int64_t padding, const float* table, float* out);

// The same, with each entry of the table rounded to bfloat16 (nearest even).
void augment(const std::uint8_t* images, BatchShape shape, const std::int64_t* indices, const std::int64_t* offsets,
             const std::int64_t* flips, std::int64_t padding, const float* table, std::uint16_t* out);

}  // namespace bmsn
