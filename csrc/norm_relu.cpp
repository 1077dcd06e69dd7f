#include "norm_relu.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <type_traits>

#include "clones.h"
#include "norm_sweep.h"
#include "pool_lines.h"

namespace bmsn {
namespace {

// totals (3, channels): m, near the mean; sum of x - m; sum of (x - m)^2. Two sweeps, so that nothing cancels.
template <typename T>
BMSN_INLINE void add_moments(const Chunk& chunk, const T* x, float* near_mean, double* totals) {
    const std::int64_t channels = chunk.channels;
    std::fill_n(totals, 3 * channels, 0.);
    for (std::int64_t column = 0; column < chunk.width; column += kBlock) {
        Block sum{};
        sweep(chunk, column, [&](std::int64_t j, std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
            sum.at[j] = sum.at[j] + load(x + at, count);
        });
        fold<T>(sum, channels, column, totals);
    }
    for (std::int64_t c = 0; c < channels; ++c) {
        near_mean[c] = static_cast<float>(totals[c] / static_cast<double>(chunk.rows));
        totals[c] = static_cast<double>(near_mean[c]);
    }
    for (std::int64_t column = 0; column < chunk.width; column += kBlock) {
        const Block m = spread<T>(near_mean, channels, column);
        Block sum{}, square{};
        sweep(chunk, column, [&](std::int64_t j, std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
            const Pair d = only<T>(count, load(x + at, count) - m.at[j]);
            sum.at[j] = sum.at[j] + d;
            square.at[j] = square.at[j] + d * d;
        });
        fold<T>(sum, channels, column, totals + channels);
        fold<T>(square, channels, column, totals + 2 * channels);
    }
}

// The sweeps below are templates that the BMSN_CLONES functions inline: a clone can neither be one nor hold an OpenMP region.

BMSN_CLONES void moments_of(const Chunk& chunk, const float* x, float* near_mean, double* totals) {
    add_moments(chunk, x, near_mean, totals);
}
BMSN_CLONES void moments_of(const Chunk& chunk, const std::uint16_t* x, float* near_mean, double* totals) {
    add_moments(chunk, x, near_mean, totals);
}

template <Shortcut kind, bool affine, typename T>
BMSN_INLINE void normalise(const Chunk& chunk, const Branch<T>& main, const Branch<T>& shortcut, T* y) {
    const std::int64_t channels = chunk.channels;
    for (std::int64_t column = 0; column < chunk.width; column += kBlock) {
        const Block mean = spread<T>(main.mean, channels, column), scale = spread<T>(main.scale, channels, column);
        Block mean2{}, scale2{}, shift{};
        if constexpr (affine) shift = spread<T>(main.shift, channels, column);
        if constexpr (kind == Shortcut::normalised) {
            mean2 = spread<T>(shortcut.mean, channels, column);
            scale2 = spread<T>(shortcut.scale, channels, column);
            if constexpr (affine) shift = shift + spread<T>(shortcut.shift, channels, column);
        }
        sweep(chunk, column, [&](std::int64_t j, std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
            Pair value = (load(main.x + at, count) - mean.at[j]) * scale.at[j];
            if constexpr (kind == Shortcut::plain) value = value + load(shortcut.x + at, count);
            if constexpr (kind == Shortcut::normalised)
                value = value + (load(shortcut.x + at, count) - mean2.at[j]) * scale2.at[j];
            if constexpr (affine) value = value + shift.at[j];
            store(y + at, count, where_positive(value, value));
        });
    }
}

template <typename T>
BMSN_INLINE void normalise(const Chunk& chunk, Shortcut kind, const Branch<T>& main, const Branch<T>& shortcut, T* y) {
    const auto run = [&]<bool affine>(std::bool_constant<affine>) __attribute__((always_inline)) {
        if (kind == Shortcut::none) normalise<Shortcut::none, affine>(chunk, main, shortcut, y);
        if (kind == Shortcut::plain) normalise<Shortcut::plain, affine>(chunk, main, shortcut, y);
        if (kind == Shortcut::normalised) normalise<Shortcut::normalised, affine>(chunk, main, shortcut, y);
    };
    main.shift ? run(std::true_type{}) : run(std::false_type{});
}

BMSN_CLONES void normalise_chunk(const Chunk& chunk, Shortcut kind, const Branch<float>& main, const Branch<float>& shortcut,
                                 float* y) {
    normalise(chunk, kind, main, shortcut, y);
}
BMSN_CLONES void normalise_chunk(const Chunk& chunk, Shortcut kind, const Branch<std::uint16_t>& main,
                                 const Branch<std::uint16_t>& shortcut, std::uint16_t* y) {
    normalise(chunk, kind, main, shortcut, y);
}

// Mean and rstd of every group out of the chunks' totals (tasks, 3, channels), joined in their order (Chan et al. 1979), for
// the channels of one block: the totals of a wide layer are many, and lie side by side.
void join_moments(const Partition& part, std::int64_t group, std::int64_t first, std::int64_t count, const double* totals,
                  double eps, float* mean, float* rstd) {
    const auto rows = static_cast<double>(part.rows);
    const auto total = [&](std::int64_t k) { return totals + (group * part.chunks + k) * 3 * part.channels + first; };
    double centre[kBlock] = {}, square[kBlock] = {};
    for (std::int64_t k = 0; k < part.chunks; ++k) {
        const double *const t = total(k), *const sum = t + part.channels;
        const auto n = static_cast<double>(part.num_rows(k));
        for (std::int64_t c = 0; c < count; ++c) centre[c] += t[c] * n + sum[c];
    }
    for (std::int64_t c = 0; c < count; ++c) centre[c] /= rows;
    for (std::int64_t k = 0; k < part.chunks; ++k) {
        const double *const t = total(k), *const sum = t + part.channels, *const squares = sum + part.channels;
        const auto n = static_cast<double>(part.num_rows(k));
        for (std::int64_t c = 0; c < count; ++c) {
            const double off = sum[c] / n, away = t[c] + off - centre[c];
            square[c] += squares[c] - sum[c] * off + n * away * away;
        }
    }
    for (std::int64_t c = 0; c < count; ++c) {
        mean[group * part.channels + first + c] = static_cast<float>(centre[c]);
        rstd[group * part.channels + first + c] = static_cast<float>(1 / std::sqrt(square[c] / rows + eps));
    }
}

template <typename T>
void statistics(const NormShape& shape, const T* x, float* stats, double eps, int threads) {
    const Partition part(shape);
    const auto totals = std::make_unique_for_overwrite<double[]>(part.tasks * 3 * part.channels);
    const std::int64_t blocks = (part.channels + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads)
    {
        const auto near_mean = std::make_unique_for_overwrite<float[]>(part.channels);
#pragma omp for schedule(static)
        for (std::int64_t task = 0; task < part.tasks; ++task)
            moments_of(part.chunk(task), x + part.offset(task), near_mean.get(), totals.get() + task * 3 * part.channels);
#pragma omp for schedule(static)
        for (std::int64_t block = 0; block < shape.groups * blocks; ++block) {
            const std::int64_t first = block % blocks * kBlock, count = std::min(part.channels - first, kBlock);
            join_moments(part, block / blocks, first, count, totals.get(), eps, stats, stats + shape.groups * part.channels);
        }
    }
}

template <typename T>
void apply(const NormShape& shape, Shortcut kind, const NormApply<T>& call, int threads) {
    const std::int64_t channels = shape.channels, unit = call.pooled ? 2 * call.width : 1;  // rows that go together
    const std::int64_t units = shape.rows / unit, at_once = std::clamp<std::int64_t>(kChunk / (unit * channels), 1, units);
    const std::int64_t chunks = (units + at_once - 1) / at_once, width = std::lcm(channels, kBlock);
    const Normalisation main(shape, call.stats, call.affine);
    std::optional<Normalisation> other;
    if (kind == Shortcut::normalised) other.emplace(shape, call.shortcut_stats, call.shortcut_affine);
#pragma omp parallel num_threads(threads)
    {
        const auto kept = std::make_unique_for_overwrite<T[]>(call.full ? 0 : at_once * unit * channels);
#pragma omp for schedule(static)
        for (std::int64_t task = 0; task < shape.groups * chunks; ++task) {
            const std::int64_t group = task / chunks, first = task % chunks * at_once, count = std::min(at_once, units - first);
            const std::int64_t offset = (group * shape.rows + first * unit) * channels;
            Branch<T> shortcut{};
            if (kind == Shortcut::plain) shortcut.x = call.shortcut + offset;
            if (other) shortcut = other->at(call.shortcut, group, offset);
            T* const y = call.full ? call.full + offset : kept.get();
            normalise_chunk({channels, count * unit, width}, kind, main.at(call.x, group, offset), shortcut, y);
            for (std::int64_t line = 0; call.pooled && line < count; ++line) {
                const std::int64_t at = line * unit * channels, to = (offset + at) / 4;
                pool_lines(call.pool, call.width, channels, y + at, call.pooled + to, call.index ? call.index + to : nullptr);
            }
        }
    }
}

template <typename T>
void forward(const NormShape& shape, Shortcut kind, const NormForward<T>& call, double eps, int threads) {
    float* const shortcut_stats = call.stats + 2 * shape.groups * shape.channels;
    if (!call.known) statistics(shape, call.x, call.stats, eps, threads);
    if (!call.known && kind == Shortcut::normalised) statistics(shape, call.shortcut, shortcut_stats, eps, threads);
    apply<T>(shape, kind,
             {call.x, call.shortcut, call.stats, shortcut_stats, call.affine, call.affine ? call.affine + 2 * shape.channels : nullptr,
              call.index ? nullptr : call.y, call.index ? call.y : nullptr, call.index, call.pool, call.width},
             threads);
}

}  // namespace

void norm_relu(const NormShape& shape, Shortcut kind, const NormForward<float>& call, double eps, int threads) {
    forward(shape, kind, call, eps, threads);
}
void norm_relu(const NormShape& shape, Shortcut kind, const NormForward<std::uint16_t>& call, double eps, int threads) {
    forward(shape, kind, call, eps, threads);
}
void batch_statistics(const NormShape& shape, const float* x, float* stats, double eps, int threads) {
    statistics(shape, x, stats, eps, threads);
}
void batch_statistics(const NormShape& shape, const std::uint16_t* x, float* stats, double eps, int threads) {
    statistics(shape, x, stats, eps, threads);
}
void norm_add_relu_pool(const NormShape& shape, Shortcut kind, const NormApply<float>& call, int threads) {
    apply(shape, kind, call, threads);
}
void norm_add_relu_pool(const NormShape& shape, Shortcut kind, const NormApply<std::uint16_t>& call, int threads) {
    apply(shape, kind, call, threads);
}

}  // namespace bmsn
