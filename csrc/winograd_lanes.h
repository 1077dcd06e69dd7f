// Winograd's minimal filtering with tiles of 4x4 values, 16 channels at a time: what forward pass and weight gradient share.
//
// Of one row of 4, by the points 0, 1, -1 and infinity: d -> (d0 - d2, d1 + d2, d2 - d1, d3 - d1), and of both directions
// one after the other. Then a convolution is 16 products of matrices, one for each place p of a tile.
//
// Source: Lavin & Gray 2015, "Fast algorithms for convolutional neural networks", section 4.1, with the sign of the last row
// turned, so that it serves F(2x2, 3x3), the forward pass, and F(3x3, 2x2), the gradient of the weights.
#pragma once

#include "lanes.h"

namespace bmsn {
namespace {

constexpr std::int64_t kPoints = 16, kPatch = 4;  // places of a tile; its side

// Elements from one point's tiles to the next's: a line more than they need, or all points' would fall into the same set of a cache.
constexpr std::int64_t pitch_of(std::int64_t tiles, std::int64_t channels) { return tiles * channels + kLanes; }

// A map (height, width, channels), where it is read: relu((x - mean) * rstd) where there is a mean.
struct Map {
    std::int64_t height, width, channels;
    const float *x, *mean, *rstd;
};

// Tiles of 4x4 that overlap by two rows and columns, the first of them beginning in rows `first` - 1, ... `last` - 3 (0 outside of
// the map), transformed: of place p at points + p * pitch, (tiles, channels).
template <bool kNormed>
BMSN_AVX512_INLINE void transform_rows(const Map& map, std::int64_t first, std::int64_t last, float* points, std::int64_t pitch) {
    const std::int64_t channels = map.channels, line = map.width * channels;
    for (std::int64_t row = first; row < last; row += 2, points += map.width / 2 * channels) {
        const float* const above = map.x + (row - 1) * line;  // read where it is in the map
        const __mmask16 top = row > 0 ? kAll : 0, bottom = row + 2 < map.height ? kAll : 0;
        for (std::int64_t c = 0; c < channels; c += kLanes) {
            const __m512 mean = kNormed ? _mm512_loadu_ps(map.mean + c) : _mm512_setzero_ps();
            const __m512 rstd = kNormed ? _mm512_loadu_ps(map.rstd + c) : _mm512_setzero_ps();
            const auto value = [&](__mmask16 there, const float* at) BMSN_AVX512 {
                const __m512 x = _mm512_maskz_loadu_ps(there, at);
                if (!kNormed) return x;
                return _mm512_maskz_max_ps(there, _mm512_setzero_ps(), _mm512_mul_ps(_mm512_sub_ps(x, mean), rstd));
            };
            __m512 column[4][kPatch];  // of a tile, transformed downwards
            const auto down = [&](std::int64_t x, __m512(&d)[kPatch]) BMSN_AVX512 {
                const float* const at = above + x * channels + c;
                const __m512 d0 = value(top, at), d1 = value(kAll, at + line);
                const __m512 d2 = value(kAll, at + 2 * line), d3 = value(bottom, at + 3 * line);
                d[0] = _mm512_sub_ps(d0, d2);
                d[1] = _mm512_add_ps(d1, d2);
                d[2] = _mm512_sub_ps(d2, d1);
                d[3] = _mm512_sub_ps(d3, d1);
            };
            for (__m512& d : column[0]) d = _mm512_setzero_ps();  // left of the map
            down(0, column[1]);
            float* to = points + c;
            for (std::int64_t x = 1; x < map.width; x += 2, to += channels) {
                down(x, column[2]);
                if (x + 1 < map.width)
                    down(x + 1, column[3]);
                else
                    for (__m512& d : column[3]) d = _mm512_setzero_ps();
#pragma GCC unroll 4
                for (std::int64_t k = 0; k < kPatch; ++k) {
                    float* const at = to + kPatch * k * pitch;
                    _mm512_store_ps(at, _mm512_sub_ps(column[0][k], column[2][k]));
                    _mm512_store_ps(at + pitch, _mm512_add_ps(column[1][k], column[2][k]));
                    _mm512_store_ps(at + 2 * pitch, _mm512_sub_ps(column[2][k], column[1][k]));
                    _mm512_store_ps(at + 3 * pitch, _mm512_sub_ps(column[3][k], column[1][k]));
                    column[0][k] = column[2][k];  // the next tile's first two
                    column[1][k] = column[3][k];
                }
            }
        }
    }
}

BMSN_AVX512_INLINE void transform_tiles(const Map& map, std::int64_t first, std::int64_t last, float* points, std::int64_t pitch) {
    map.mean ? transform_rows<true>(map, first, last, points, pitch) : transform_rows<false>(map, first, last, points, pitch);
}

}  // namespace
}  // namespace bmsn
