#include "conv_forward.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)

#include <cstring>
#include <type_traits>

#include "conv_strips.h"
#include "half_lanes.h"

namespace bmsn {
namespace {

using Bits = std::uint32_t;  // the same pixel of two neighbouring channels

constexpr std::int64_t kQuad = 4;            // pixels are taken by the four of a row
constexpr std::int64_t kBlock = 2 * kLanes;  // outputs
constexpr std::int64_t kFrame = 16384;       // bytes of an image's rows that are computed at a time, so that they stay in L1

std::int64_t pairs_of(std::int64_t channels) { return (channels + 1) / 2; }

// Weights of a block of 32 outputs (at the end perhaps 16) as the tiles read them: taps, pairs of inputs, outputs.
BMSN_BF16 void pack_block(const ConvBranch<Half>& branch, std::int64_t in, const Half* weight, std::int64_t o, std::int64_t block,
                          Bits* to) {
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
BMSN_BF16 void load_rows(const ConvInput<Half>& input, const Half* x, const float* mean, const float* rstd, std::int64_t first,
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

// A strip in quads of pixels, and where its frame lies.
struct Rows : Strip<Half> {
    std::int64_t quads, pairs;
    const Bits* frame;
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

struct HalfKernel {
    using Value = Half;
    using Word = Bits;
    using Convolve = void (*)(const HalfKernel&, const Strip<Half>&, const Bits*, const Bits*);

    const ConvInput<Half>& input;
    std::int64_t pairs, height, scratch_size;

    explicit HalfKernel(const ConvInput<Half>& input) : input(input), pairs(pairs_of(input.channels)) {
        const std::int64_t line = (input.width + 2) * pairs;
        height = std::clamp<std::int64_t>(kFrame / 4 / line - 2, 1, input.height);
        scratch_size = (height + 2) * line;
    }

    std::int64_t weight_size(const ConvBranch<Half>& branch) const { return branch.kernel * branch.kernel * pairs * branch.channels; }

    std::int64_t pack_items(const ConvBranch<Half>& branch) const { return (branch.channels + kBlock - 1) / kBlock; }

    void pack(const ConvBranch<Half>& branch, const Half* weight, std::int64_t item, Bits* to) const {
        const std::int64_t o = item * kBlock, taps = branch.kernel * branch.kernel;
        pack_block(branch, input.channels, weight, o, std::min(kBlock, branch.channels - o), to + o * taps * pairs);
    }

    void load(const Half* x, const float* mean, const float* rstd, std::int64_t first, std::int64_t last, Bits* frame) const {
        load_rows(input, x, mean, rstd, first, last, reinterpret_cast<Half*>(frame));
    }

    Convolve convolver(const ConvBranch<Half>& branch) const;
};

template <int kKernel, End kEnd, int kPairs>
BMSN_BF16 void convolve_rows(const HalfKernel& kernel, const Strip<Half>& strip, const Bits* weight, const Bits* frame) {
    const Rows rows{strip, strip.rows * strip.width / kQuad, kernel.pairs, frame};
    const std::int64_t size = kKernel * kKernel * rows.pairs;
    std::int64_t o = 0;
    for (; o + kBlock <= rows.out; o += kBlock) add_outputs<2, kKernel, kEnd, kPairs>(rows, weight + o * size, o);
    if (o < rows.out) add_outputs<1, kKernel, kEnd, kPairs>(rows, weight + o * size, o);
}

template <End kEnd>
HalfKernel::Convolve convolver_of(std::int64_t kernel, std::int64_t pairs) {
    const auto of = [pairs]<int kKernel>(std::integral_constant<int, kKernel>) {
        return pairs == 8    ? convolve_rows<kKernel, kEnd, 8>
               : pairs == 16 ? convolve_rows<kKernel, kEnd, 16>
               : pairs == 32 ? convolve_rows<kKernel, kEnd, 32>
                             : convolve_rows<kKernel, kEnd, 0>;
    };
    return kernel == 3 ? of(std::integral_constant<int, 3>{}) : of(std::integral_constant<int, 1>{});
}

HalfKernel::Convolve HalfKernel::convolver(const ConvBranch<Half>& branch) const {
    switch (end_of(branch)) {
        case End::masked: return convolver_of<End::masked>(branch.kernel, pairs);
        case End::measured: return convolver_of<End::measured>(branch.kernel, pairs);
        case End::scaled: return convolver_of<End::scaled>(branch.kernel, pairs);
        default: return convolver_of<End::plain>(branch.kernel, pairs);
    }
}

}  // namespace

bool has_conv_forward(std::uint16_t) { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }

void conv_forward(const ConvInput<Half>& input, std::span<const ConvBranch<Half>> branches, double eps, int threads) {
    convolve_strips(HalfKernel(input), input, branches, eps, threads);
}

}  // namespace bmsn

#else

namespace bmsn {

bool has_conv_forward(std::uint16_t) { return false; }
void conv_forward(const ConvInput<std::uint16_t>&, std::span<const ConvBranch<std::uint16_t>>, double, int) {}

}  // namespace bmsn

#endif
