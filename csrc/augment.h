// Training batches: gather, crop from a padded image, flip, normalise by table, cast, in one pass. Padding is 0 after
// normalisation.
#pragma once

#include <cstdint>

namespace bmsn {

struct BatchShape {
    std::int64_t num_images, height, width, channels;
};

// The crops and flips of a batch. Image i of it takes the words of Philox's counter (i, step, step >> 32, 0).
struct Draws {
    std::uint64_t key, step;
    std::int64_t padding;
};

// out[i, y, x, c] = table[v, c], v = image[indices[i]][y + top - padding, column + left - padding, c], 0 where that lies
// outside the image; column = width - 1 - x where image i is flipped, else x; top and left in 0..2 * padding.
// images: uint8 NHWC. indices: num_images. draws: null: images as they are. table: 256 x channels. out: NHWC.
void augment(const std::uint8_t* images, BatchShape shape, const std::int64_t* indices, const Draws* draws, const float* table,
             float* out);

// The same in bfloat16, table and all.
void augment(const std::uint8_t* images, BatchShape shape, const std::int64_t* indices, const Draws* draws,
             const std::uint16_t* table, std::uint16_t* out);

}  // namespace bmsn
