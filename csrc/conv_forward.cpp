#include "conv_forward.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "half_lanes.h"

namespace bmsn {
namespace {

using Bits = std::uint32_t;  // the same pixel of two neighbouring channels

constexpr std::int64_t kQuad = 4;       // pixels are taken by the four of a row
constexpr std::int64_t kFrame = 16384;  // bytes of an image's rows that are computed at a time, so that they stay in L1

struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;
template <typename T>
Buffer<T> make_buffer(std::int64_t size) {
    return Buffer<T>(static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), std::align_val_t{64})));
}

std::int64_t pairs_of(std::int64_t channels) { return (channels + 1) / 2; }

// Weights of a block of 32 outputs (at the end perhaps 16) as the tiles read them: taps, pairs of inputs, outputs.
BMSN_BF16 void pack(const ConvBranch& branch, std::int64_t in, const Half* weight, std::int64_t o, std::int64_t block, Bits* to) {
    const std::int64_t taps = branch.kernel * branch.kernel, out = branch.channels;
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i rows = _mm512_mullo_epi32(places, _mm512_set1_epi32(static_cast<int>(taps * in / 2)));
    for (std::int64_t tap = 0; tap < taps; ++tap)
        for (std::int64_t i = 0; i < in; i += 2)
            for (std::int64_t k = o; k < o + block; k += kLanes, to += kLanes) {
                if (branch.transposed) {
                    const Half* const from = weight + (i * taps + taps - 1 - tap) * out + k;
                    _mm512_store_si512(to, _mm512_or_si512(load_low(from), load_high(from + taps * out)));
                } else if (in % 2 == 0) {
                    const Half* const from = weight + (k * taps + tap) * in + i;
                    _mm512_store_si512(to, _mm512_mask_i32gather_epi32(places, kAll, rows, from, 4));
                } else {
                    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
                        const Half* const from = weight + ((k + lane) * taps + tap) * in + i;
                        to[lane] = from[0] | (i + 1 < in ? static_cast<Bits>(from[1]) << 16 : 0);
                    }
                }
            }
}

// Rows `first` to `last` of an image and one on either side, 0 outside of it, into a frame whose first and last column are 0:
// (last - first + 2, width + 2, pairs). Normalised if that is asked for.
BMSN_BF16 void load(const ConvInput& input, const Half* x, const float* mean, const float* rstd, std::int64_t first,
                    std::int64_t last, Half* frame) {
    const std::int64_t in = input.channels, pixel = 2 * pairs_of(in), size = input.width * in, line = input.width * pixel;
    Half* to = frame + pixel;
    for (std::int64_t row = first - 1; row <= last; ++row, to += line + 2 * pixel) {
        const Half* const from = x + row * size;
        if (row < 0 || row == input.height) {
            std::fill_n(to, line, Half{0});
        } else if (mean) {
            normalise_row(from, size, in, mean, rstd, to);
        } else if (in == pixel) {
            std::memcpy(to, from, static_cast<std::size_t>(size) * sizeof(Half));
        } else {
            for (std::int64_t p = 0; p < input.width; ++p) std::copy_n(from + p * in, in, to + p * pixel);
        }
    }
}

// What becomes of a convolution: nothing more, moments of it, what stands behind it with frozen statistics, or ReLU's mask.
enum class End { plain, measured, scaled, masked };

// Some rows of one image: of how many pixels, where their frame lies and where their results go. `moments` (3, out): a value
// among these, the sum of all others' distances from it, and of their squares; or, masked, 0, the sum, and that of the products
// with masked_by - mean.
struct Rows {
    std::int64_t width, quads, pairs, out;
    const Bits* frame;
    Half* y;
    float* moments;
    const float *scale, *shift;
    const Half* shortcut;
    bool relu;
    const Half* masked_by;
    const float* mean;
};

// kQuads quads of pixels, N vectors of outputs from `o` on. kPairs: the pairs of inputs where the compiler shall know them.
template <int N, int kQuads, int kKernel, End kEnd, int kPairs>
BMSN_BF16_INLINE void tile(const Rows& rows, const Bits* weight, std::int64_t quad, std::int64_t o, __m512 (&moments)[3][N]) {
    constexpr int kPixels = kQuads * kQuad;
    const std::int64_t pairs = kPairs ? kPairs : rows.pairs, pitch = (rows.width + 2) * pairs, quads = rows.width / kQuad;
    const Bits* from[kQuads];
    for (int q = 0; q < kQuads; ++q) {
        from[q] = rows.frame + (quad + q) / quads * pitch + (quad + q) % quads * kQuad * pairs;
        if (kKernel == 1) from[q] += pitch + pairs;
    }
    __m512 sum[kPixels][N];
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[p][n] = _mm512_setzero_ps();
    for (std::int64_t line = 0; line < kKernel; ++line)
        for (std::int64_t tap = 0; tap < kKernel; ++tap) {
            const Bits* at[kQuads];
            for (int q = 0; q < kQuads; ++q) at[q] = from[q] + line * pitch + tap * pairs;
            for (std::int64_t c = 0; c < pairs; ++c, weight += N * kLanes) {
                __m512bh w[N];
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) w[n] = (__m512bh)_mm512_load_si512(weight + n * kLanes);
#pragma GCC unroll 16
                for (int p = 0; p < kPixels; ++p) {
                    const auto x = (__m512bh)_mm512_set1_epi32(static_cast<int>(at[p / kQuad][p % kQuad * pairs + c]));
#pragma GCC unroll 2
                    for (int n = 0; n < N; ++n) sum[p][n] = _mm512_dpbf16_ps(sum[p][n], x, w[n]);
                }
            }
        }
    if (kEnd == End::measured && quad == 0)
        for (int n = 0; n < N; ++n) moments[0][n] = sum[0][n];
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
            const std::int64_t c = o + n * kLanes, place = (quad * kQuad + p) * rows.out + c;
            if constexpr (kEnd == End::scaled) {
                sum[p][n] = _mm512_fmadd_ps(sum[p][n], _mm512_loadu_ps(rows.scale + c), _mm512_loadu_ps(rows.shift + c));
                if (rows.shortcut) sum[p][n] = _mm512_add_ps(sum[p][n], widen(rows.shortcut + place));
                if (rows.relu) sum[p][n] = relu(sum[p][n]);
            }
            if constexpr (kEnd == End::masked) {
                const __m512 d = _mm512_sub_ps(widen(rows.masked_by + place), _mm512_loadu_ps(rows.mean + c));
                const __mmask16 positive = _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NLE_UQ);  // or NaN
                sum[p][n] = _mm512_maskz_mov_ps(positive, sum[p][n]);
                moments[1][n] = _mm512_add_ps(moments[1][n], sum[p][n]);
                moments[2][n] = _mm512_fmadd_ps(sum[p][n], d, moments[2][n]);
            }
            narrow(rows.y + place, sum[p][n]);
            if constexpr (kEnd == End::measured) {
                const __m512 d = _mm512_sub_ps(sum[p][n], moments[0][n]);
                moments[1][n] = _mm512_add_ps(moments[1][n], d);
                moments[2][n] = _mm512_fmadd_ps(d, d, moments[2][n]);
            }
        }
}

template <int N, int kKernel, End kEnd, int kPairs>
BMSN_BF16_INLINE void add_outputs(const Rows& rows, const Bits* weight, std::int64_t o) {
    constexpr int kQuads = N == 1 ? 4 : 2;  // 16 sums: enough to hide a product's latency
    const std::int64_t whole = rows.quads - rows.quads % kQuads;
    __m512 moments[3][N];
    for (int n = 0; n < N; ++n) moments[0][n] = moments[1][n] = moments[2][n] = _mm512_setzero_ps();
    for (std::int64_t q = 0; q < whole; q += kQuads) tile<N, kQuads, kKernel, kEnd, kPairs>(rows, weight, q, o, moments);
    for (std::int64_t q = whole; q < rows.quads; ++q) tile<N, 1, kKernel, kEnd, kPairs>(rows, weight, q, o, moments);
    if constexpr (kEnd == End::measured || kEnd == End::masked)
        for (int m = 0; m < 3; ++m)
            for (int n = 0; n < N; ++n) _mm512_storeu_ps(rows.moments + m * rows.out + o + n * kLanes, moments[m][n]);
}

template <int kKernel, End kEnd, int kPairs>
BMSN_BF16 void convolve_rows(const Rows& rows, const Bits* weight) {
    const std::int64_t size = kKernel * kKernel * rows.pairs;
    std::int64_t o = 0;
    for (; o + 2 * kLanes <= rows.out; o += 2 * kLanes) add_outputs<2, kKernel, kEnd, kPairs>(rows, weight + o * size, o);
    if (o < rows.out) add_outputs<1, kKernel, kEnd, kPairs>(rows, weight + o * size, o);
}

template <End kEnd>
auto convolver(std::int64_t kernel, std::int64_t pairs) {
    const auto of = [pairs]<int kKernel>(std::integral_constant<int, kKernel>) {
        return pairs == 8    ? convolve_rows<kKernel, kEnd, 8>
               : pairs == 16 ? convolve_rows<kKernel, kEnd, 16>
               : pairs == 32 ? convolve_rows<kKernel, kEnd, 32>
                             : convolve_rows<kKernel, kEnd, 0>;
    };
    return kernel == 3 ? of(std::integral_constant<int, 3>{}) : of(std::integral_constant<int, 1>{});
}

// How an image is cut: so many rows at a time, at the end perhaps fewer.
struct Strips {
    std::int64_t count, height;
};

// A branch with its weights packed, (sets, blocks, taps, pairs, outputs), and the moments of every strip of every image.
struct Prepared {
    ConvBranch branch;
    std::int64_t set_size;
    Buffer<Bits> weights;
    Buffer<float> moments;
    void (*convolve)(const Rows&, const Bits*);

    Prepared(const ConvBranch& branch, const ConvInput& input, const Strips& strips)
        : branch(branch),
          set_size(branch.kernel * branch.kernel * pairs_of(input.channels) * branch.channels),
          weights(make_buffer<Bits>(branch.sets * set_size)),
          moments(make_buffer<float>(branch.stats ? input.groups * input.images * strips.count * 3 * branch.channels : 0)),
          convolve((branch.masked_by ? convolver<End::masked>
                    : branch.stats   ? convolver<End::measured>
                    : branch.scale   ? convolver<End::scaled>
                                     : convolver<End::plain>)(branch.kernel, pairs_of(input.channels))) {}
};

// Mean and rstd of a group from the moments of its strips, in float64, one after the other (Chan et al. 1979). `sums`: 2 * out.
void join(const ConvInput& input, const Strips& strips, const Prepared& prepared, std::int64_t group, double eps, double* sums) {
    const std::int64_t out = prepared.branch.channels, all = input.images * strips.count;
    double *const mean = sums, *const squares = sums + out, pixels = 0;
    std::fill_n(sums, 2 * out, 0.);
    const float* from = prepared.moments.get() + group * all * 3 * out;
    for (std::int64_t n = 0; n < all; ++n, from += 3 * out) {
        const std::int64_t rows = std::min(strips.height, input.height - n % strips.count * strips.height);
        const auto own = static_cast<double>(rows * input.width);
        const double share = own / (pixels + own), between = pixels * share;
        pixels += own;
        for (std::int64_t c = 0; c < out; ++c) {
            const double beyond = from[out + c] / own, delta = from[c] + beyond - mean[c];
            mean[c] += delta * share;
            squares[c] += from[2 * out + c] - from[out + c] * beyond + delta * delta * between;
        }
    }
    for (std::int64_t c = 0; c < out; ++c) {
        const double variance = squares[c] / pixels;
        prepared.branch.stats[group * out + c] = static_cast<float>(mean[c]);
        prepared.branch.stats[(input.groups + group) * out + c] =
            static_cast<float>(1.0 / std::sqrt((variance < 0 ? 0 : variance) + eps));
    }
}

// The line of a group's gradient from the sums of its strips. `sums`: 2 * out.
void join_line(const ConvInput& input, const Strips& strips, const Prepared& prepared, std::int64_t group, double* sums) {
    const ConvBranch& branch = prepared.branch;
    const std::int64_t out = branch.channels, all = input.images * strips.count;
    std::fill_n(sums, 2 * out, 0.);
    const float* from = prepared.moments.get() + group * all * 3 * out;
    for (std::int64_t n = 0; n < all; ++n, from += 3 * out)
        for (std::int64_t k = 0; k < 2 * out; ++k) sums[k] += from[out + k];
    const auto pixels = static_cast<double>(input.images * input.height * input.width);
    for (std::int64_t c = 0; c < out; ++c) {
        const std::int64_t linear = (input.groups + group) * out + c;
        const double rstd = branch.masked_stats[linear], share = rstd / pixels;
        branch.stats[group * out + c] = static_cast<float>(sums[c] * share);
        branch.stats[linear] = static_cast<float>(sums[out + c] * rstd * rstd * share);
    }
}

}  // namespace

bool has_conv_forward() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }

void conv_forward(const ConvInput& input, std::span<const ConvBranch> branches, double eps, int threads) {
    const std::int64_t in = input.channels, images = input.groups * input.images, pairs = pairs_of(in);
    const std::int64_t line = (input.width + 2) * pairs;  // of the frame, in Bits
    const std::int64_t height = std::clamp<std::int64_t>(kFrame / 4 / line - 2, 1, input.height);
    const Strips strips{(input.height + height - 1) / height, height};
    const std::int64_t frame_size = (height + 2) * line;
    std::int64_t widest = 0;
    std::vector<Prepared> all;
    for (const ConvBranch& branch : branches) {
        all.emplace_back(branch, input, strips);
        widest = std::max(widest, branch.channels);
    }
    const auto frames = make_buffer<Bits>(threads * frame_size);  // here, because nothing may throw in a parallel region
    const auto sums = make_buffer<double>(threads * 2 * widest);
#pragma omp parallel num_threads(threads)
    {
        for (const Prepared& one : all) {
            const std::int64_t blocks = (one.branch.channels + 2 * kLanes - 1) / (2 * kLanes), taps = one.branch.kernel * one.branch.kernel;
#pragma omp for schedule(static)
            for (std::int64_t item = 0; item < one.branch.sets * blocks; ++item) {
                const std::int64_t set = item / blocks, o = item % blocks * 2 * kLanes;
                pack(one.branch, in, one.branch.weight + set * one.branch.set_stride, o,
                     std::min(2 * kLanes, one.branch.channels - o), one.weights.get() + set * one.set_size + o * taps * pairs);
            }
        }
        Bits* const frame = frames.get() + omp_get_thread_num() * frame_size;
        double* const own_sums = sums.get() + omp_get_thread_num() * 2 * widest;
        std::fill_n(frame, frame_size, Bits{0});
#pragma omp for schedule(static)
        for (std::int64_t n = 0; n < images; ++n) {
            const std::int64_t g = n / input.images;
            const float* const mean = input.stats ? input.stats + g * in : nullptr;
            const float* const rstd = input.stats ? input.stats + (input.groups + g) * in : nullptr;
            for (std::int64_t first = 0; first < input.height; first += height) {
                const std::int64_t last = std::min(first + height, input.height);
                load(input, input.x + n * input.height * input.width * in, mean, rstd, first, last, reinterpret_cast<Half*>(frame));
                for (const Prepared& one : all) {
                    const std::int64_t out = one.branch.channels;
                    Half* const y = one.branch.y + (n * input.height + first) * input.width * out;
                    float* const moments = one.moments.get() + (n * strips.count + first / height) * (one.branch.stats ? 3 * out : 0);
                    const bool scaled = one.branch.scale;
                    one.convolve({.width = input.width,
                                  .quads = (last - first) * input.width / kQuad,
                                  .pairs = pairs,
                                  .out = out,
                                  .frame = frame,
                                  .y = y,
                                  .moments = moments,
                                  .scale = scaled ? one.branch.scale + g * out : nullptr,
                                  .shift = scaled ? one.branch.shift + g * out : nullptr,
                                  .shortcut = one.branch.shortcut ? one.branch.shortcut + (y - one.branch.y) : nullptr,
                                  .relu = one.branch.relu,
                                  .masked_by = one.branch.masked_by ? one.branch.masked_by + (y - one.branch.y) : nullptr,
                                  .mean = one.branch.masked_by ? one.branch.masked_stats + g * out : nullptr},
                                 one.weights.get() + (input.weight_index ? input.weight_index[g] : 0) * one.set_size);
                }
            }
        }
        for (const Prepared& one : all)
            if (one.branch.stats) {
#pragma omp for schedule(static)
                for (std::int64_t g = 0; g < input.groups; ++g)
                    one.branch.masked_by ? join_line(input, strips, one, g, own_sums) : join(input, strips, one, g, eps, own_sums);
            }
    }
}

}  // namespace bmsn

#else

namespace bmsn {

bool has_conv_forward() { return false; }
void conv_forward(const ConvInput&, std::span<const ConvBranch>, double, int) {}

}  // namespace bmsn

#endif
