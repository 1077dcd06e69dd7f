#include "conv_gradient.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)

#include <omp.h>

#include <algorithm>
#include <bit>
#include <memory>

#include "half_lanes.h"

namespace bmsn {
namespace {

constexpr std::int64_t kIn = 16, kOut = 8, kTaps = 3;  // a block of sums: 3 x 8 registers of 16
constexpr std::int64_t kBlock = kTaps * kOut * kIn;
constexpr std::int64_t kParts = 16;

using Bits = std::uint32_t;  // the same channel of two neighbouring pixels

// Pairs of a row's pixels (2q, 2q + 1), channels innermost.
BMSN_BF16 void pair_even(const Half* row, std::int64_t width, std::int64_t channels, Bits* to) {
    for (std::int64_t q = 0; q < width / 2; ++q)
        for (std::int64_t c = 0; c < channels; c += 8) {
            const auto* const left = reinterpret_cast<const __m128i*>(row + 2 * q * channels + c);
            const auto* const right = reinterpret_cast<const __m128i*>(row + (2 * q + 1) * channels + c);
            const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(left));
            const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(right)), 16);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + q * channels + c), _mm256_or_si256(low, high));
        }
}

// Pairs (2q - 1, 2q), of which the first and the last lie half outside of the row: width / 2 + 1.
BMSN_BF16 void pair_odd(const Half* row, std::int64_t width, std::int64_t channels, Bits* to) {
    Bits* const last = to + width / 2 * channels;
    for (std::int64_t c = 0; c < channels; ++c) {
        to[c] = static_cast<Bits>(row[c]) << 16;
        last[c] = row[(width - 1) * channels + c];
    }
    pair_even(row + channels, width - 2, channels, to + channels);
}

struct Paired {
    Bits *even, *odd, *grad;
};

// Adds to one block of sums (3, 8, 16) what `rows` rows give: 8 channels of grad with 16 of x at three taps of one line.
BMSN_BF16 void add_block(const ConvShape& shape, const Paired& from, std::int64_t rows, float* sums) {
    const std::int64_t pairs = shape.width / 2, in = shape.in_channels, out = shape.out_channels;
    __m512 sum[kTaps][kOut];
#pragma GCC unroll 3
    for (std::int64_t tap = 0; tap < kTaps; ++tap)
#pragma GCC unroll 8
        for (std::int64_t o = 0; o < kOut; ++o) sum[tap][o] = _mm512_loadu_ps(sums + (tap * kOut + o) * kIn);
    const Bits *even = from.even, *odd = from.odd, *grad = from.grad;
    for (std::int64_t row = 0; row < rows; ++row, odd += in)  // odd has one pair more
        for (std::int64_t q = 0; q < pairs; ++q, even += in, odd += in, grad += out) {
            const auto x0 = (__m512bh)_mm512_loadu_si512(odd), x1 = (__m512bh)_mm512_loadu_si512(even);
            const auto x2 = (__m512bh)_mm512_loadu_si512(odd + in);
#pragma GCC unroll 8
            for (std::int64_t o = 0; o < kOut; ++o) {
                const auto g = (__m512bh)_mm512_set1_epi32(static_cast<int>(grad[o]));
                sum[0][o] = _mm512_dpbf16_ps(sum[0][o], x0, g);
                sum[1][o] = _mm512_dpbf16_ps(sum[1][o], x1, g);
                sum[2][o] = _mm512_dpbf16_ps(sum[2][o], x2, g);
            }
        }
#pragma GCC unroll 3
    for (std::int64_t tap = 0; tap < kTaps; ++tap)
#pragma GCC unroll 8
        for (std::int64_t o = 0; o < kOut; ++o) _mm512_storeu_ps(sums + (tap * kOut + o) * kIn, sum[tap][o]);
}

// Adds one image, paired, to all blocks (3 lines, out / 8, in / 16) of a part's sums.
void add_image(const ConvShape& shape, const Paired& from, float* sums) {
    const std::int64_t in = shape.in_channels, out = shape.out_channels, pairs = shape.width / 2, rows = shape.height;
    for (std::int64_t line = 0; line < kTaps; ++line) {
        const std::int64_t x_row = line == 2 ? 1 : 0, grad_row = line == 0 ? 1 : 0;  // where both are in the map
        for (std::int64_t o = 0; o < out; o += kOut)
            for (std::int64_t i = 0; i < in; i += kIn, sums += kBlock)
                add_block(shape,
                          {from.even + x_row * pairs * in + i, from.odd + x_row * (pairs + 1) * in + i,
                           from.grad + grad_row * pairs * out + o},
                          line == 1 ? rows : rows - 1, sums);
    }
}

BMSN_BF16 void add_images(const ConvShape& shape, std::int64_t first, std::int64_t last, const Half* x, const float* stats,
                          const Half* grad, Bits* buffer, float* sums) {
    const std::int64_t in = shape.in_channels, out = shape.out_channels, pairs = shape.width / 2, size = shape.width * in;
    const Paired to{buffer, buffer + shape.height * pairs * in, buffer + shape.height * (2 * pairs + 1) * in};
    auto* const normalised = reinterpret_cast<Half*>(to.grad + shape.height * pairs * out);  // one row
    for (std::int64_t n = first; n < last; ++n) {
        for (std::int64_t h = 0; h < shape.height; ++h) {
            const std::int64_t row = (n * shape.height + h) * shape.width;
            const Half* line = x + row * in;
            if (stats) {
                normalise_row(line, size, in, stats, stats + in, normalised);
                line = normalised;
            }
            pair_even(line, shape.width, in, to.even + h * pairs * in);
            pair_odd(line, shape.width, in, to.odd + h * (pairs + 1) * in);
            pair_even(grad + row * out, shape.width, out, to.grad + h * pairs * out);
        }
        add_image(shape, to, sums);
    }
}

Half rounded(float x) {  // to bfloat16: nearest, ties to even; a NaN stays one
    const auto bits = std::bit_cast<Bits>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<Half>((bits >> 16) | 0x40);
    return static_cast<Half>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

bool has_conv_weight_gradient(std::uint16_t) { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }

void conv_weight_gradient(const ConvShape& shape, const Half* x, const float* stats, const Half* grad, Half* dw, int threads) {
    const std::int64_t in = shape.in_channels, out = shape.out_channels, size = kTaps * kTaps * in * out;
    const std::int64_t parts = std::min(kParts, shape.images);
    const auto sums = std::make_unique_for_overwrite<float[]>(parts * size);
    // x paired twice, grad once, and a row of x: here, because nothing may throw in a parallel region
    const std::int64_t buffer_size = shape.height * (shape.width / 2 * (2 * in + out) + in) + shape.width * in / 2;
    const auto buffers = std::make_unique_for_overwrite<Bits[]>(threads * buffer_size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (std::int64_t part = 0; part < parts; ++part) {
            std::fill_n(sums.get() + part * size, size, 0.f);
            add_images(shape, part * shape.images / parts, (part + 1) * shape.images / parts, x, stats, grad,
                       buffers.get() + omp_get_thread_num() * buffer_size, sums.get() + part * size);
        }
#pragma omp for schedule(static)
        for (std::int64_t block = 0; block < size / kBlock; ++block) {
            const std::int64_t i = block % (in / kIn) * kIn, o = block / (in / kIn) % (out / kOut) * kOut;
            const std::int64_t line = block / (in / kIn) / (out / kOut);
            float* const total = sums.get() + block * kBlock;
            for (std::int64_t part = 1; part < parts; ++part)
                for (std::int64_t k = 0; k < kBlock; ++k) total[k] += total[part * size + k];
            for (std::int64_t k = 0; k < kBlock; ++k) {
                const std::int64_t tap = line * kTaps + k / (kOut * kIn);
                dw[((o + k / kIn % kOut) * kTaps * kTaps + tap) * in + i + k % kIn] = rounded(total[k]);
            }
        }
    }
}

}  // namespace bmsn

#else

namespace bmsn {

bool has_conv_weight_gradient(std::uint16_t) { return false; }
void conv_weight_gradient(const ConvShape&, const std::uint16_t*, const float*, const std::uint16_t*, std::uint16_t*, int) {}

}  // namespace bmsn

#endif
