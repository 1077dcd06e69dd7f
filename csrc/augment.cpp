#include "augment.h"

#include <algorithm>

#include "philox.h"

namespace bmsn {
namespace {

// Below, one thread. A batch of 128 CIFAR images takes one 120 us; two save 45 us, and lose 20 ms where another process
// has one of the two cores and the other waits for it.
constexpr std::int64_t kMinParallelValues = 1 << 20;

// Images in random order are not in any cache: fetching the next one meanwhile takes a batch of 128 CIFAR images from 170 to
// 120 us. Of a large image only the beginning, after which the hardware follows by itself.
void prefetch(const std::uint8_t* image, std::int64_t size) {
    constexpr std::int64_t kMaxBytes = 4096, kLine = 64;
    for (std::int64_t byte = 0; byte < std::min(size, kMaxBytes); byte += kLine) __builtin_prefetch(image + byte);
}

// kChannels: known at compile time for the usual numbers, which unrolls the innermost loop; 0 for any other.
template <int kChannels, typename T>
void augment_image(const std::uint8_t* image, BatchShape shape, std::int64_t top, std::int64_t left, bool flip, const T* table,
                   T* out) {
    const std::int64_t channels = kChannels ? kChannels : shape.channels, width = shape.width;
    const std::int64_t shift = flip ? -left : left;  // of the image under the window, in output columns
    const std::int64_t begin = std::clamp<std::int64_t>(-shift, 0, width), end = std::clamp<std::int64_t>(width - shift, 0, width);
    const std::int64_t step = flip ? -channels : channels;
    for (std::int64_t y = 0; y < shape.height; ++y) {
        T* const row = out + y * width * channels;
        const auto fill = [&](std::int64_t from, std::int64_t to) {
            if (from < to) std::fill_n(row + from * channels, (to - from) * channels, T{});
        };
        if (y + top < 0 || y + top >= shape.height) {
            fill(0, width);
            continue;
        }
        fill(0, begin);
        const std::int64_t column = (flip ? width - 1 - begin : begin) + left;
        const std::uint8_t* source = image + ((y + top) * width + column) * channels;
        for (std::int64_t x = begin; x < end; ++x, source += step)
            for (std::int64_t c = 0; c < channels; ++c) row[x * channels + c] = table[source[c] * channels + c];
        fill(end, width);
    }
}

template <typename T>
void augment_batch(const std::uint8_t* images, BatchShape shape, const std::int64_t* indices, const Draws* draws, const T* table,
                   T* out) {
    const auto one = shape.channels == 3 ? augment_image<3, T> : shape.channels == 1 ? augment_image<1, T> : augment_image<0, T>;
    const std::int64_t size = shape.height * shape.width * shape.channels;
#pragma omp parallel for schedule(static) if (shape.num_images * size >= kMinParallelValues)
    for (std::int64_t i = 0; i < shape.num_images; ++i) {
        if (i + 1 < shape.num_images) prefetch(images + indices[i + 1] * size, size);
        std::int64_t top = 0, left = 0;
        bool flip = false;
        if (draws != nullptr) {
            const auto step = draws->step;
            const auto word = philox(draws->key, {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(step),
                                                  static_cast<std::uint32_t>(step >> 32), 0});
            const auto places = static_cast<std::uint32_t>(2 * draws->padding + 1);
            top = below(places, word[0]) - draws->padding;
            left = below(places, word[1]) - draws->padding;
            flip = below(2, word[2]) != 0;
        }
        one(images + indices[i] * size, shape, top, left, flip, table, out + i * size);
    }
}

}  // namespace

void augment(const std::uint8_t* images, BatchShape shape, const std::int64_t* indices, const Draws* draws, const float* table,
             float* out) {
    augment_batch(images, shape, indices, draws, table, out);
}

void augment(const std::uint8_t* images, BatchShape shape, const std::int64_t* indices, const Draws* draws,
             const std::uint16_t* table, std::uint16_t* out) {
    augment_batch(images, shape, indices, draws, table, out);
}

}  // namespace bmsn
