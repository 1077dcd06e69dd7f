#include "conv_gradient.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)

#include <omp.h>

#include <algorithm>

#include "buffer.h"
#include "winograd_lanes.h"

namespace bmsn {
namespace {

constexpr std::int64_t kParts = 16;
constexpr std::int64_t kCache = 1 << 18;  // bytes of transformed tiles at a time, about: they and the sums fit the L2 cache

// Tiles of 2x2 values of rows `first` to `last` of a gradient at the four points: as `transform_tiles` has them. The halves that
// belong to points 1 and -1 are left to the end.
BMSN_AVX512 void transform_gradient(const Map& map, std::int64_t first, std::int64_t last, float* points, std::int64_t pitch) {
    const std::int64_t channels = map.channels, line = map.width * channels;
    for (std::int64_t row = first; row < last; row += 2)
        for (std::int64_t x = 0; x < map.width; x += 2, points += channels)
            for (std::int64_t c = 0; c < channels; c += kLanes) {
                const float* const from = map.x + row * line + x * channels + c;
                __m512 left[kPatch], right[kPatch];  // transformed downwards
                const auto down = [line](const float* at, __m512(&g)[kPatch]) BMSN_AVX512 {
                    g[0] = _mm512_loadu_ps(at);
                    g[3] = _mm512_loadu_ps(at + line);
                    g[1] = _mm512_add_ps(g[0], g[3]);
                    g[2] = _mm512_sub_ps(g[0], g[3]);
                };
                down(from, left);
                down(from + channels, right);
#pragma GCC unroll 4
                for (std::int64_t k = 0; k < kPatch; ++k) {
                    float* const at = points + kPatch * k * pitch + c;
                    _mm512_store_ps(at, left[k]);
                    _mm512_store_ps(at + pitch, _mm512_add_ps(left[k], right[k]));
                    _mm512_store_ps(at + 2 * pitch, _mm512_sub_ps(left[k], right[k]));
                    _mm512_store_ps(at + 3 * pitch, right[k]);
                }
            }
}

// Adds what `tiles` tiles give at one point to a block of sums (kOut, N * 16): N vectors of inputs by kOut outputs.
template <int N, int kOut>
BMSN_AVX512_INLINE void add_block(std::int64_t tiles, std::int64_t in, std::int64_t out, const float* x, const float* grad, float* sums) {
    __m512 sum[kOut][N];
#pragma GCC unroll 16
    for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[o][n] = _mm512_load_ps(sums + (o * N + n) * kLanes);
    for (std::int64_t t = 0; t < tiles; ++t, x += in, grad += out) {
        __m512 a[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) a[n] = _mm512_load_ps(x + n * kLanes);
#pragma GCC unroll 16
        for (int o = 0; o < kOut; ++o) {
            const __m512 g = _mm512_set1_ps(grad[o]);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) sum[o][n] = _mm512_fmadd_ps(g, a[n], sum[o][n]);
        }
    }
#pragma GCC unroll 16
    for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) _mm512_store_ps(sums + (o * N + n) * kLanes, sum[o][n]);
}

// Some tiles of both maps: room for how many, rows of pixels at a time, and where they lie.
struct Tiles {
    std::int64_t room, rows;
    float *x, *grad;

    Tiles(const ConvShape& shape) {
        const std::int64_t across = shape.width / 2, bytes = kPoints * 4 * (shape.in_channels + shape.out_channels);
        rows = 2 * std::clamp<std::int64_t>(kCache / bytes / across, 1, shape.height / 2);
        room = std::max(kCache / bytes, rows / 2 * across);
    }

    std::int64_t x_size(const ConvShape& shape) const { return kPoints * pitch_of(room, shape.in_channels); }
    std::int64_t size(const ConvShape& shape) const { return x_size(shape) + kPoints * pitch_of(room, shape.out_channels); }
};

// Adds `count` tiles to all sums: (16, blocks of inputs, out, inputs of a block).
BMSN_AVX512 void add_tiles(const ConvShape& shape, const Tiles& tiles, std::int64_t count, float* sums) {
    const std::int64_t in = shape.in_channels, out = shape.out_channels;
    const float *x = tiles.x, *grad = tiles.grad;
    for (std::int64_t p = 0; p < kPoints; ++p, x += pitch_of(tiles.room, in), grad += pitch_of(tiles.room, out)) {
        std::int64_t i = 0;
        for (; i + 2 * kLanes <= in; i += 2 * kLanes)
            for (std::int64_t o = 0; o < out; o += 8, sums += 16 * kLanes) add_block<2, 8>(count, in, out, x + i, grad + o, sums);
        if (i < in)
            for (std::int64_t o = 0; o < out; o += 16, sums += 16 * kLanes) add_block<1, 16>(count, in, out, x + i, grad + o, sums);
    }
}

// Small maps are gathered until there is no room for more, so that the sums are seldom read and written.
BMSN_AVX512 void add_images(const ConvShape& shape, const Tiles& tiles, std::int64_t first, std::int64_t last, const float* x,
                            const float* stats, const float* grad, float* sums) {
    const std::int64_t in = shape.in_channels, out = shape.out_channels, pixels = shape.height * shape.width;
    const float* const rstd = stats ? stats + in : nullptr;
    std::int64_t count = 0;
    for (std::int64_t n = first; n < last; ++n)
        for (std::int64_t row = 0; row < shape.height; row += tiles.rows) {
            const std::int64_t end = std::min(row + tiles.rows, shape.height), more = (end - row) / 2 * (shape.width / 2);
            if (count + more > tiles.room) {
                add_tiles(shape, tiles, count, sums);
                count = 0;
            }
            const Map of_x{shape.height, shape.width, in, x + n * pixels * in, stats, rstd};
            const Map of_grad{shape.height, shape.width, out, grad + n * pixels * out, nullptr, nullptr};
            transform_tiles(of_x, row, end, tiles.x + count * in, pitch_of(tiles.room, in));
            transform_gradient(of_grad, row, end, tiles.grad + count * out, pitch_of(tiles.room, out));
            count += more;
        }
    add_tiles(shape, tiles, count, sums);
}

// Three taps from a filter's sums at the four points.
void taps_of(const float* from, std::int64_t pitch, float (&tap)[3]) {
    const float plus = .5f * (from[pitch] + from[2 * pitch]), minus = .5f * (from[pitch] - from[2 * pitch]);
    tap[0] = from[0] + plus;
    tap[1] = minus;
    tap[2] = plus + from[3 * pitch];
}

}  // namespace

bool has_conv_weight_gradient(float) { return __builtin_cpu_supports("avx512f"); }

void conv_weight_gradient(const ConvShape& shape, const float* x, const float* stats, const float* grad, float* dw, int threads) {
    const std::int64_t in = shape.in_channels, out = shape.out_channels, pitch = in * out, size = kPoints * pitch;
    const std::int64_t parts = std::min(kParts, shape.images);
    const Tiles tiles(shape);
    const auto sums = make_buffer<float>(parts * size);
    const auto points = make_buffer<float>(threads * tiles.size(shape));  // here, because nothing may throw in a parallel region
#pragma omp parallel num_threads(threads)
    {
        Tiles own = tiles;
        own.x = points.get() + omp_get_thread_num() * tiles.size(shape);
        own.grad = own.x + tiles.x_size(shape);
#pragma omp for schedule(static)
        for (std::int64_t part = 0; part < parts; ++part) {
            std::fill_n(sums.get() + part * size, size, 0.f);
            const std::int64_t first = part * shape.images / parts, last = (part + 1) * shape.images / parts;
            add_images(shape, own, first, last, x, stats, grad, sums.get() + part * size);
        }
#pragma omp for schedule(static)
        for (std::int64_t at = 0; at < size; at += pitch)
            for (std::int64_t part = 1; part < parts; ++part)
                for (std::int64_t k = at; k < at + pitch; ++k) sums[k] += sums[part * size + k];
#pragma omp for schedule(static)
        for (std::int64_t o = 0; o < out; ++o)
            for (std::int64_t i = 0; i < in; ++i) {
                const std::int64_t block = i / (2 * kLanes) * 2 * kLanes, lanes = std::min(2 * kLanes, in - block);
                const float* const from = sums.get() + block * out + o * lanes + i - block;
                float half[3][kPatch], tap[3];
                for (std::int64_t p = 0; p < kPatch; ++p) {
                    taps_of(from + p * pitch, kPatch * pitch, tap);
                    for (std::int64_t r = 0; r < 3; ++r) half[r][p] = tap[r];
                }
                for (std::int64_t r = 0; r < 3; ++r) {
                    taps_of(half[r], 1, tap);
                    for (std::int64_t s = 0; s < 3; ++s) dw[((o * 3 + r) * 3 + s) * in + i] = tap[s];
                }
            }
    }
}

}  // namespace bmsn

#else

namespace bmsn {

bool has_conv_weight_gradient(float) { return false; }
void conv_weight_gradient(const ConvShape&, const float*, const float*, const float*, float*, int) {}

}  // namespace bmsn

#endif
