#include "pool_lines.h"

#include <algorithm>

#include "clones.h"
#include "norm_lanes.h"

namespace bmsn {
namespace {

using Bits32 __attribute__((may_alias)) = std::uint32_t;

template <typename Bits>
BMSN_INLINE void pool_max(std::int64_t width, std::int64_t channels, const Bits* lines, Bits* out) {
    const Bits* const below = lines + width * channels;
    for (std::int64_t x = 0; x < width / 2; ++x)
        for (std::int64_t c = 0; c < channels; ++c) {
            const std::int64_t left = 2 * x * channels + c, right = left + channels;
            out[x * channels + c] = std::max(std::max(lines[left], lines[right]), std::max(below[left], below[right]));
        }
}

template <typename Bits>
BMSN_INLINE void pool_max(std::int64_t width, std::int64_t channels, const Bits* lines, Bits* out, std::uint8_t* index) {
    const Bits* const below = lines + width * channels;
    for (std::int64_t x = 0; x < width / 2; ++x)
        for (std::int64_t c = 0; c < channels; ++c) {
            const std::int64_t left = 2 * x * channels + c, right = left + channels;
            const Bits top = std::max(lines[left], lines[right]), bottom = std::max(below[left], below[right]);
            const auto top_place = static_cast<std::uint8_t>(lines[right] > lines[left]);
            const auto bottom_place = static_cast<std::uint8_t>(2 + (below[right] > below[left]));
            out[x * channels + c] = std::max(top, bottom);
            index[x * channels + c] = bottom > top ? bottom_place : top_place;
        }
}

template <typename Bits>
BMSN_INLINE void unpool_max(std::int64_t width, std::int64_t channels, const Bits* grad, const Bits* pooled, const std::uint8_t* index,
                        Bits* lines) {
    Bits* const below = lines + width * channels;
    for (std::int64_t x = 0; x < width / 2; ++x)
        for (std::int64_t c = 0; c < channels; ++c) {
            const std::int64_t at = x * channels + c, left = 2 * x * channels + c, right = left + channels;
            const Bits value = pooled[at] != 0 ? grad[at] : 0;
            lines[left] = index[at] == 0 ? value : 0;
            lines[right] = index[at] == 1 ? value : 0;
            below[left] = index[at] == 2 ? value : 0;
            below[right] = index[at] == 3 ? value : 0;
        }
}

template <typename T>
BMSN_INLINE void pool_mean(std::int64_t width, std::int64_t channels, const T* lines, T* out) {
    const T* const below = lines + width * channels;
    for (std::int64_t x = 0; x < width / 2; ++x)
        for (std::int64_t c = 0; c < channels; ++c) {
            const std::int64_t left = 2 * x * channels + c, right = left + channels;
            const float sum = widened(lines[left]) + widened(lines[right]) + widened(below[left]) + widened(below[right]);
            narrow(out[x * channels + c], 0.25f * sum);
        }
}

template <typename Bits>
BMSN_INLINE void positives(std::int64_t width, std::int64_t channels, const Bits* lines, std::uint8_t* index) {
    const Bits* const below = lines + width * channels;
    for (std::int64_t x = 0; x < width / 2; ++x)
        for (std::int64_t c = 0; c < channels; ++c) {
            const std::int64_t left = 2 * x * channels + c, right = left + channels;
            index[x * channels + c] = static_cast<std::uint8_t>((lines[left] != 0) | (lines[right] != 0) << 1 |
                                                                (below[left] != 0) << 2 | (below[right] != 0) << 3);
        }
}

template <typename T>
BMSN_INLINE void unpool_mean(std::int64_t width, std::int64_t channels, const T* grad, const std::uint8_t* index, T* lines) {
    T* const below = lines + width * channels;
    for (std::int64_t x = 0; x < width / 2; ++x)
        for (std::int64_t c = 0; c < channels; ++c) {
            const std::int64_t at = x * channels + c, left = 2 * x * channels + c, right = left + channels;
            T quarter;
            narrow(quarter, 0.25f * widened(grad[at]));
            lines[left] = index[at] & 1 ? quarter : T{};
            lines[right] = index[at] & 2 ? quarter : T{};
            below[left] = index[at] & 4 ? quarter : T{};
            below[right] = index[at] & 8 ? quarter : T{};
        }
}

template <typename Bits, typename T>
BMSN_INLINE void pool(Pool pool, std::int64_t width, std::int64_t channels, const T* lines, T* out, std::uint8_t* index) {
    static_assert(sizeof(T) == sizeof(Bits));
    const auto* const from = reinterpret_cast<const Bits*>(lines);
    if (pool == Pool::mean) {
        pool_mean(width, channels, lines, out);
        if (index) positives(width, channels, from, index);
        return;
    }
    index ? pool_max(width, channels, from, reinterpret_cast<Bits*>(out), index)
          : pool_max(width, channels, from, reinterpret_cast<Bits*>(out));
}

template <typename Bits, typename T>
BMSN_INLINE void unpool(Pool pool, std::int64_t width, std::int64_t channels, const T* grad, const T* pooled,
                        const std::uint8_t* index, T* lines) {
    if (pool == Pool::mean) return unpool_mean(width, channels, grad, index, lines);
    unpool_max(width, channels, reinterpret_cast<const Bits*>(grad), reinterpret_cast<const Bits*>(pooled), index,
               reinterpret_cast<Bits*>(lines));
}

}  // namespace

BMSN_CLONES void pool_lines(Pool kind, std::int64_t width, std::int64_t channels, const float* lines, float* out,
                            std::uint8_t* index) {
    pool<Bits32>(kind, width, channels, lines, out, index);
}
BMSN_CLONES void pool_lines(Pool kind, std::int64_t width, std::int64_t channels, const std::uint16_t* lines, std::uint16_t* out,
                            std::uint8_t* index) {
    pool<std::uint16_t>(kind, width, channels, lines, out, index);
}
BMSN_CLONES void unpool_lines(Pool kind, std::int64_t width, std::int64_t channels, const float* grad, const float* pooled,
                              const std::uint8_t* index, float* lines) {
    unpool<Bits32>(kind, width, channels, grad, pooled, index, lines);
}
BMSN_CLONES void unpool_lines(Pool kind, std::int64_t width, std::int64_t channels, const std::uint16_t* grad,
                              const std::uint16_t* pooled, const std::uint8_t* index, std::uint16_t* lines) {
    unpool<std::uint16_t>(kind, width, channels, grad, pooled, index, lines);
}

}  // namespace bmsn
