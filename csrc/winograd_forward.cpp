#include "conv_forward.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)

#include "conv_strips.h"
#include "winograd_lanes.h"

namespace bmsn {
namespace {

constexpr std::int64_t kTiles = 32;          // of a strip, about: their points fit the L1 and L2 caches
constexpr std::int64_t kBlock = 2 * kLanes;  // outputs

// Three taps of 16 filters at the four points.
BMSN_AVX512_INLINE void at_points(__m512 first, __m512 middle, __m512 last, __m512 (&to)[kPatch]) {
    const __m512 half = _mm512_set1_ps(.5f), ends = _mm512_add_ps(first, last);
    to[0] = first;
    to[1] = _mm512_mul_ps(half, _mm512_add_ps(ends, middle));
    to[2] = _mm512_mul_ps(half, _mm512_sub_ps(ends, middle));
    to[3] = last;
}

struct WinogradKernel {
    using Value = float;
    using Word = float;
    using Convolve = void (*)(const WinogradKernel&, const Strip<float>&, const float*, float*);

    const ConvInput<float>& input;
    std::int64_t across, height, tiles, sums_at, scratch_size;  // tiles of a row; of a strip, in eights

    WinogradKernel(const ConvInput<float>& input, std::span<const ConvBranch<float>> branches)
        : input(input), across(input.width / 2) {
        const std::int64_t rows = std::clamp<std::int64_t>(kTiles / across, 1, input.height / 2);
        height = 2 * rows;
        tiles = (rows * across + 7) / 8 * 8;
        std::int64_t widest = 0;
        for (const ConvBranch<float>& branch : branches) widest = std::max(widest, branch.channels);
        sums_at = kPoints * pitch_of(tiles, input.channels);  // behind the transformed tiles: their products with the weights
        scratch_size = sums_at + kPoints * pitch_of(tiles, widest);
    }

    std::int64_t weight_size(const ConvBranch<float>& branch) const { return kPoints * input.channels * branch.channels; }

    std::int64_t pack_items(const ConvBranch<float>& branch) const { return (branch.channels + kBlock - 1) / kBlock; }

    // A block of outputs, (points, blocks, inputs, outputs).
    BMSN_AVX512 void pack(const ConvBranch<float>& branch, const float* weight, std::int64_t item, float* to) const {
        const std::int64_t in = input.channels, out = branch.channels, first = item * kBlock;
        const std::int64_t block = std::min(kBlock, out - first), pitch = in * out;
        const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i rows = _mm512_mullo_epi32(places, _mm512_set1_epi32(static_cast<int>(9 * in)));
        for (std::int64_t i = 0; i < in; ++i)
            for (std::int64_t o = 0; o < block; o += kLanes) {
                const auto filter = [&](std::int64_t tap) BMSN_AVX512 {
                    if (branch.transposed) return _mm512_loadu_ps(weight + (i * 9 + 8 - tap) * out + first + o);
                    const float* const from = weight + ((first + o) * 9 + tap) * in + i;
                    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAll, rows, from, 4);
                };
                __m512 column[3][kPatch], point[kPatch];
                for (std::int64_t s = 0; s < 3; ++s) at_points(filter(s), filter(3 + s), filter(6 + s), column[s]);
                for (std::int64_t p = 0; p < kPatch; ++p) {
                    at_points(column[0][p], column[1][p], column[2][p], point);
                    for (std::int64_t q = 0; q < kPatch; ++q)
                        _mm512_store_ps(to + (kPatch * p + q) * pitch + first * in + i * block + o, point[q]);
                }
            }
    }

    BMSN_AVX512 void load(const float* x, const float* mean, const float* rstd, std::int64_t first, std::int64_t last,
                          float* scratch) const {
        const Map map{input.height, input.width, input.channels, x, mean, rstd};
        transform_tiles(map, first, last, scratch, pitch_of(tiles, input.channels));
    }

    Convolve convolver(const ConvBranch<float>& branch) const;
};

// kTilesNow tiles by N vectors of outputs, at one point.
template <int N, int kTilesNow>
BMSN_AVX512_INLINE void multiply_block(std::int64_t in, std::int64_t out, const float* points, const float* weight, float* sums) {
    __m512 sum[kTilesNow][N];
#pragma GCC unroll 16
    for (int t = 0; t < kTilesNow; ++t)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[t][n] = _mm512_setzero_ps();
    for (std::int64_t c = 0; c < in; ++c, weight += N * kLanes) {
        __m512 w[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) w[n] = _mm512_load_ps(weight + n * kLanes);
#pragma GCC unroll 16
        for (int t = 0; t < kTilesNow; ++t) {
            const __m512 x = _mm512_set1_ps(points[t * in + c]);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) sum[t][n] = _mm512_fmadd_ps(x, w[n], sum[t][n]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTilesNow; ++t)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) _mm512_store_ps(sums + t * out + n * kLanes, sum[t][n]);
}

// All points' products. kIn: the inputs where the compiler shall know them.
template <int kIn>
BMSN_AVX512_INLINE void multiply(const WinogradKernel& kernel, std::int64_t out, const float* points, const float* weight, float* sums) {
    const std::int64_t in = kIn ? kIn : kernel.input.channels, tiles = kernel.tiles;
    for (std::int64_t p = 0; p < kPoints; ++p, points += pitch_of(tiles, in), sums += pitch_of(tiles, out)) {
        std::int64_t o = 0;
        for (; o + kBlock <= out; o += kBlock, weight += kBlock * in)
            for (std::int64_t t = 0; t < tiles; t += 8) multiply_block<2, 8>(in, out, points + t * in, weight, sums + t * out + o);
        if (o < out) {
            std::int64_t t = 0;
            for (; t + 16 <= tiles; t += 16) multiply_block<1, 16>(in, out, points + t * in, weight, sums + t * out + o);
            if (t < tiles) multiply_block<1, 8>(in, out, points + t * in, weight, sums + t * out + o);
            weight += kLanes * in;
        }
    }
}

// One pixel's 16 outputs from `o` on, on their way to memory.
template <End kEnd>
BMSN_AVX512_INLINE void put(const Strip<float>& strip, std::int64_t pixel, std::int64_t o, __m512 y, __m512 (&moments)[3]) {
    const std::int64_t place = pixel * strip.out + o;
    if constexpr (kEnd == End::scaled) {
        y = _mm512_fmadd_ps(y, _mm512_loadu_ps(strip.scale + o), _mm512_loadu_ps(strip.shift + o));
        if (strip.shortcut) y = _mm512_add_ps(y, _mm512_loadu_ps(strip.shortcut + place));
        if (strip.relu) y = relu(y);
    }
    if constexpr (kEnd == End::masked) {
        const __m512 d = _mm512_sub_ps(_mm512_loadu_ps(strip.masked_by + place), _mm512_loadu_ps(strip.mean + o));
        y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NLE_UQ), y);  // or NaN
        moments[1] = _mm512_add_ps(moments[1], y);
        moments[2] = _mm512_fmadd_ps(y, d, moments[2]);
    }
    if constexpr (kEnd == End::measured) {
        if (pixel == 0) moments[0] = y;
        const __m512 d = _mm512_sub_ps(y, moments[0]);
        moments[1] = _mm512_add_ps(moments[1], d);
        moments[2] = _mm512_fmadd_ps(d, d, moments[2]);
    }
    _mm512_storeu_ps(strip.y + place, y);
}

// Pixels from the products of their tiles.
template <End kEnd>
BMSN_AVX512_INLINE void finish(const WinogradKernel& kernel, const Strip<float>& strip, const float* sums) {
    const std::int64_t out = strip.out, pitch = pitch_of(kernel.tiles, out);
    for (std::int64_t o = 0; o < out; o += kLanes) {
        __m512 moments[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        const float* from = sums + o;
        for (std::int64_t row = 0; row < strip.rows; row += 2)
            for (std::int64_t t = 0; t < kernel.across; ++t, from += out) {
                __m512 half[2][kPatch];  // transformed downwards
#pragma GCC unroll 4
                for (std::int64_t k = 0; k < kPatch; ++k) {
                    const float* const at = from + k * pitch;
                    const __m512 s1 = _mm512_load_ps(at + 4 * pitch), s2 = _mm512_load_ps(at + 8 * pitch);
                    half[0][k] = _mm512_add_ps(_mm512_load_ps(at), _mm512_add_ps(s1, s2));
                    half[1][k] = _mm512_add_ps(_mm512_sub_ps(s1, s2), _mm512_load_ps(at + 12 * pitch));
                }
#pragma GCC unroll 2
                for (std::int64_t k = 0; k < 2; ++k) {
                    const std::int64_t pixel = (row + k) * strip.width + 2 * t;
                    const __m512(&s)[kPatch] = half[k];
                    put<kEnd>(strip, pixel, o, _mm512_add_ps(s[0], _mm512_add_ps(s[1], s[2])), moments);
                    put<kEnd>(strip, pixel + 1, o, _mm512_add_ps(_mm512_sub_ps(s[1], s[2]), s[3]), moments);
                }
            }
        if constexpr (kEnd == End::measured || kEnd == End::masked)
            for (int m = 0; m < 3; ++m) _mm512_storeu_ps(strip.moments + m * out + o, moments[m]);
    }
}

template <End kEnd, int kIn>
BMSN_AVX512 void convolve_strip(const WinogradKernel& kernel, const Strip<float>& strip, const float* weight, float* scratch) {
    multiply<kIn>(kernel, strip.out, scratch, weight, scratch + kernel.sums_at);
    finish<kEnd>(kernel, strip, scratch + kernel.sums_at);
}

template <End kEnd>
WinogradKernel::Convolve convolver_of(std::int64_t in) {
    return in == 16   ? convolve_strip<kEnd, 16>
           : in == 32 ? convolve_strip<kEnd, 32>
           : in == 64 ? convolve_strip<kEnd, 64>
                      : convolve_strip<kEnd, 0>;
}

WinogradKernel::Convolve WinogradKernel::convolver(const ConvBranch<float>& branch) const {
    switch (end_of(branch)) {
        case End::masked: return convolver_of<End::masked>(input.channels);
        case End::measured: return convolver_of<End::measured>(input.channels);
        case End::scaled: return convolver_of<End::scaled>(input.channels);
        default: return convolver_of<End::plain>(input.channels);
    }
}

}  // namespace

bool has_conv_forward(float) { return __builtin_cpu_supports("avx512f"); }

void conv_forward(const ConvInput<float>& input, std::span<const ConvBranch<float>> branches, double eps, int threads) {
    convolve_strips(WinogradKernel(input, branches), input, branches, eps, threads);
}

}  // namespace bmsn

#else

namespace bmsn {

bool has_conv_forward(float) { return false; }
void conv_forward(const ConvInput<float>&, std::span<const ConvBranch<float>>, double, int) {}

}  // namespace bmsn

#endif
