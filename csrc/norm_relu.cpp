#include "norm_relu.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <type_traits>

#include "clones.h"
#include "norm_lanes.h"
#include "partition.h"
#include "pool_lines.h"

namespace bmsn {
namespace {

struct Block {
    Pair at[kPairs];
};

// The values of a block's lanes out of one value for each channel.
template <typename T>
BMSN_INLINE Block spread(const float* values, std::int64_t channels, std::int64_t column) {
    float lanes[kBlock];
    for (std::int64_t lane = 0, c = column % channels; lane < kBlock; c = 0) {
        const std::int64_t run = std::min(channels - c, kBlock - lane);
        std::copy_n(values + c, run, lanes + lane);
        lane += run;
    }
    Block block;
    for (std::int64_t j = 0; j < kPairs; ++j) block.at[j] = Lanes<T>::from_memory_order(load(lanes + j * kPair));
    return block;
}

// Adds a block's lanes to their channels' totals.
template <typename T>
BMSN_INLINE void fold(const Block& block, std::int64_t channels, std::int64_t column, double* totals) {
    float lanes[kBlock];
    for (std::int64_t j = 0; j < kPairs; ++j) store(lanes + j * kPair, Lanes<T>::to_memory_order(block.at[j]));
    for (std::int64_t lane = 0, c = column % channels; lane < kBlock; c = 0) {
        const std::int64_t run = std::min(channels - c, kBlock - lane);
        for (std::int64_t i = 0; i < run; ++i) totals[c + i] += static_cast<double>(lanes[lane + i]);
        lane += run;
    }
}

// Calls body(j, offset, count) for the pairs of one column of blocks, from the first row to the last.
template <typename Body>
BMSN_INLINE void sweep(const Chunk& chunk, std::int64_t column, Body body) {
    const std::int64_t values = chunk.rows * chunk.channels, whole = values / chunk.width * chunk.width;
    for (std::int64_t at = column; at < whole; at += chunk.width) {
#pragma GCC unroll 2
        for (std::int64_t j = 0; j < kPairs; ++j) body(j, at + j * kPair, kPair);
    }
    for (std::int64_t j = 0; j < kPairs; ++j) {
        const std::int64_t at = whole + column + j * kPair;
        if (at < values) body(j, at, std::min(values - at, kPair));
    }
}

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

// What one chunk reads of x, or of the shortcut where that is normalised: the values and one number a channel.
template <typename T>
struct Branch {
    const T* x;
    const float *mean, *rstd;
};

template <Shortcut kind, typename T>
BMSN_INLINE void normalise(const Chunk& chunk, const Branch<T>& main, const Branch<T>& shortcut, T* y) {
    const std::int64_t channels = chunk.channels;
    for (std::int64_t column = 0; column < chunk.width; column += kBlock) {
        const Block mean = spread<T>(main.mean, channels, column), rstd = spread<T>(main.rstd, channels, column);
        Block mean2{}, rstd2{};
        if constexpr (kind == Shortcut::normalised) {
            mean2 = spread<T>(shortcut.mean, channels, column);
            rstd2 = spread<T>(shortcut.rstd, channels, column);
        }
        sweep(chunk, column, [&](std::int64_t j, std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
            Pair value = (load(main.x + at, count) - mean.at[j]) * rstd.at[j];
            if constexpr (kind == Shortcut::plain) value = value + load(shortcut.x + at, count);
            if constexpr (kind == Shortcut::normalised)
                value = value + (load(shortcut.x + at, count) - mean2.at[j]) * rstd2.at[j];
            store(y + at, count, where_positive(value, value));
        });
    }
}

template <typename T>
BMSN_INLINE void normalise(const Chunk& chunk, Shortcut kind, const Branch<T>& main, const Branch<T>& shortcut, T* y) {
    if (kind == Shortcut::none) normalise<Shortcut::none>(chunk, main, shortcut, y);
    if (kind == Shortcut::plain) normalise<Shortcut::plain>(chunk, main, shortcut, y);
    if (kind == Shortcut::normalised) normalise<Shortcut::normalised>(chunk, main, shortcut, y);
}

BMSN_CLONES void normalise_chunk(const Chunk& chunk, Shortcut kind, const Branch<float>& main, const Branch<float>& shortcut,
                                 float* y) {
    normalise(chunk, kind, main, shortcut, y);
}
BMSN_CLONES void normalise_chunk(const Chunk& chunk, Shortcut kind, const Branch<std::uint16_t>& main,
                                 const Branch<std::uint16_t>& shortcut, std::uint16_t* y) {
    normalise(chunk, kind, main, shortcut, y);
}

// totals (3, channels): sum of e, sum of e * (x - mean), and the same product for a normalised shortcut.
// With a shortcut e is left in `active`: it is the gradient of a plain one.
template <Shortcut kind, bool masks, typename T>
BMSN_INLINE void sum_gradients(const Chunk& chunk, const T* grad, const T* y, const Branch<T>& main, const Branch<T>& shortcut,
                               T* active, double* totals) {
    const std::int64_t channels = chunk.channels;
    std::fill_n(totals, 3 * channels, 0.);
    for (std::int64_t column = 0; column < chunk.width; column += kBlock) {
        const Block mean = spread<T>(main.mean, channels, column);
        Block mean2{}, sum{}, product{}, product2{};
        if constexpr (kind == Shortcut::normalised) mean2 = spread<T>(shortcut.mean, channels, column);
        sweep(chunk, column, [&](std::int64_t j, std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
            const Pair d = load(main.x + at, count) - mean.at[j];
            Pair e = only<T>(count, load(grad + at, count));
            if constexpr (masks) e = where_positive(kind == Shortcut::none ? d : load(y + at, count), e);
            sum.at[j] = sum.at[j] + e;
            product.at[j] = product.at[j] + only<T>(count, e * d);
            if constexpr (kind == Shortcut::normalised)
                product2.at[j] = product2.at[j] + only<T>(count, e * (load(shortcut.x + at, count) - mean2.at[j]));
            if constexpr (masks && kind != Shortcut::none) store(active + at, count, e);
        });
        fold<T>(sum, channels, column, totals);
        fold<T>(product, channels, column, totals + channels);
        if constexpr (kind == Shortcut::normalised) fold<T>(product2, channels, column, totals + 2 * channels);
    }
}

template <typename T>
BMSN_INLINE void sum_gradients(const Chunk& chunk, Shortcut kind, bool masked, const T* grad, const T* y, const Branch<T>& main,
                               const Branch<T>& shortcut, T* active, double* totals) {
    const auto sum = [&]<bool masks>(std::bool_constant<masks>) __attribute__((always_inline)) {
        if (kind == Shortcut::none) sum_gradients<Shortcut::none, masks>(chunk, grad, y, main, shortcut, active, totals);
        if (kind == Shortcut::plain) sum_gradients<Shortcut::plain, masks>(chunk, grad, y, main, shortcut, active, totals);
        if (kind == Shortcut::normalised) sum_gradients<Shortcut::normalised, masks>(chunk, grad, y, main, shortcut, active, totals);
    };
    masked ? sum(std::true_type{}) : sum(std::false_type{});
}

BMSN_CLONES void gradient_sums_of(const Chunk& chunk, Shortcut kind, bool masked, const float* grad, const float* y,
                                  const Branch<float>& main, const Branch<float>& shortcut, float* active, double* totals) {
    sum_gradients(chunk, kind, masked, grad, y, main, shortcut, active, totals);
}
BMSN_CLONES void gradient_sums_of(const Chunk& chunk, Shortcut kind, bool masked, const std::uint16_t* grad, const std::uint16_t* y,
                                  const Branch<std::uint16_t>& main, const Branch<std::uint16_t>& shortcut,
                                  std::uint16_t* active, double* totals) {
    sum_gradients(chunk, kind, masked, grad, y, main, shortcut, active, totals);
}

// dx = rstd * e - constant - (x - mean) * linear; e = grad, which ReLU masks here where there is no shortcut.
struct Line {
    const float *constant, *linear;
};

template <bool masks, typename T>
BMSN_INLINE void gradient(const Chunk& chunk, const T* grad, const Branch<T>& branch, Line line, T* dx) {
    const std::int64_t channels = chunk.channels;
    for (std::int64_t column = 0; column < chunk.width; column += kBlock) {
        const Block mean = spread<T>(branch.mean, channels, column), rstd = spread<T>(branch.rstd, channels, column);
        const Block constant = spread<T>(line.constant, channels, column), linear = spread<T>(line.linear, channels, column);
        sweep(chunk, column, [&](std::int64_t j, std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
            const Pair d = load(branch.x + at, count) - mean.at[j];
            Pair e = load(grad + at, count);
            if constexpr (masks) e = where_positive(d, e);
            store(dx + at, count, rstd.at[j] * e - constant.at[j] - d * linear.at[j]);
        });
    }
}

BMSN_CLONES void gradient_chunk(const Chunk& chunk, bool masks, const float* grad, const Branch<float>& branch, Line line,
                                float* dx) {
    masks ? gradient<true>(chunk, grad, branch, line, dx) : gradient<false>(chunk, grad, branch, line, dx);
}
BMSN_CLONES void gradient_chunk(const Chunk& chunk, bool masks, const std::uint16_t* grad, const Branch<std::uint16_t>& branch,
                                Line line, std::uint16_t* dx) {
    masks ? gradient<true>(chunk, grad, branch, line, dx) : gradient<false>(chunk, grad, branch, line, dx);
}

// Mean and rstd of every group out of the chunks' totals (tasks, 3, channels), joined in their order (Chan et al. 1979).
void join_moments(const Partition& part, std::int64_t groups, const double* totals, double eps, float* mean, float* rstd) {
    const std::int64_t channels = part.channels;
    const auto rows = static_cast<double>(part.rows);
    for (std::int64_t g = 0; g < groups; ++g)
        for (std::int64_t c = 0; c < channels; ++c) {
            double centre = 0, square = 0;
            for (std::int64_t k = 0; k < part.chunks; ++k) {
                const double* const t = totals + (g * part.chunks + k) * 3 * channels + c;
                centre += t[0] * static_cast<double>(part.num_rows(k)) + t[channels];
            }
            centre /= rows;
            for (std::int64_t k = 0; k < part.chunks; ++k) {
                const double* const t = totals + (g * part.chunks + k) * 3 * channels + c;
                const auto n = static_cast<double>(part.num_rows(k));
                const double off = t[channels] / n, away = t[0] + off - centre;
                square += t[2 * channels] - t[channels] * off + n * away * away;
            }
            mean[g * channels + c] = static_cast<float>(centre);
            rstd[g * channels + c] = static_cast<float>(1 / std::sqrt(square / rows + eps));
        }
}

template <typename T>
void statistics(const NormShape& shape, const T* x, float* stats, double eps, int threads) {
    const Partition part(shape);
    const auto totals = std::make_unique_for_overwrite<double[]>(part.tasks * 3 * part.channels);
#pragma omp parallel num_threads(threads)
    {
        const auto near_mean = std::make_unique_for_overwrite<float[]>(part.channels);
#pragma omp for schedule(static)
        for (std::int64_t task = 0; task < part.tasks; ++task)
            moments_of(part.chunk(task), x + part.offset(task), near_mean.get(), totals.get() + task * 3 * part.channels);
    }
    join_moments(part, shape.groups, totals.get(), eps, stats, stats + shape.groups * part.channels);
}

template <typename T>
Branch<T> branch_at(const NormShape& shape, const T* x, const float* stats, std::int64_t group, std::int64_t offset) {
    const float* const mean = stats + group * shape.channels;
    return {x + offset, mean, mean + shape.groups * shape.channels};
}

template <typename T>
void apply(const NormShape& shape, Shortcut kind, const NormApply<T>& call, int threads) {
    const std::int64_t channels = shape.channels, unit = call.pooled ? 2 * call.width : 1;  // rows that go together
    const std::int64_t units = shape.rows / unit, at_once = std::clamp<std::int64_t>(kChunk / (unit * channels), 1, units);
    const std::int64_t chunks = (units + at_once - 1) / at_once, width = std::lcm(channels, kBlock);
#pragma omp parallel num_threads(threads)
    {
        const auto kept = std::make_unique_for_overwrite<T[]>(call.full ? 0 : at_once * unit * channels);
#pragma omp for schedule(static)
        for (std::int64_t task = 0; task < shape.groups * chunks; ++task) {
            const std::int64_t group = task / chunks, first = task % chunks * at_once, count = std::min(at_once, units - first);
            const std::int64_t offset = (group * shape.rows + first * unit) * channels;
            Branch<T> shortcut{};
            if (kind == Shortcut::plain) shortcut.x = call.shortcut + offset;
            if (kind == Shortcut::normalised) shortcut = branch_at(shape, call.shortcut, call.shortcut_stats, group, offset);
            T* const y = call.full ? call.full + offset : kept.get();
            normalise_chunk({channels, count * unit, width}, kind, branch_at(shape, call.x, call.stats, group, offset), shortcut, y);
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
    statistics(shape, call.x, call.stats, eps, threads);
    if (kind == Shortcut::normalised) statistics(shape, call.shortcut, shortcut_stats, eps, threads);
    apply<T>(shape, kind,
             {call.x, call.shortcut, call.stats, shortcut_stats, call.index ? nullptr : call.y, call.index ? call.y : nullptr,
              call.index, Pool::max, call.width},
             threads);
}

template <typename T>
void backward(const NormShape& shape, Shortcut kind, const NormBackward<T>& call, int threads) {
    const Partition part(shape);
    const std::int64_t channels = part.channels, num_stats = shape.groups * channels;
    const auto totals = std::make_unique_for_overwrite<double[]>(part.tasks * 3 * channels);
    const int branches = kind == Shortcut::normalised ? 2 : 1;
    const auto branch_of = [&](int branch, const T* x, std::int64_t task) {
        return branch_at(shape, x, call.stats + branch * 2 * num_stats, part.group(task), part.offset(task));
    };
    const bool adds = kind != Shortcut::none, pools = call.index != nullptr;
    const T* grad = call.grad;
    if (pools) {  // out of the windows' gradients that of the map, ReLU's mask in it, to where it can stay
        T* const whole = adds ? call.dshortcut : call.dx;
        const std::int64_t unit = 2 * call.width * channels;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (std::int64_t line = 0; line < shape.groups * shape.rows * channels / unit; ++line)
            unpool_lines(call.width, channels, call.grad + line * unit / 4, call.y + line * unit / 4, call.index + line * unit / 4,
                         whole + line * unit);
        grad = whole;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t task = 0; task < part.tasks; ++task) {
        const std::int64_t at = part.offset(task);
        const Branch<T> shortcut = kind == Shortcut::normalised ? branch_of(1, call.shortcut, task) : Branch<T>{};
        gradient_sums_of(part.chunk(task), kind, !pools, grad + at, adds && !pools ? call.y + at : nullptr,
                         branch_of(0, call.x, task), shortcut, adds ? call.dshortcut + at : nullptr, totals.get() + task * 3 * channels);
    }
    const auto lines = std::make_unique_for_overwrite<float[]>(branches * 2 * num_stats);  // (branches, 2, groups, channels)
    for (int branch = 0; branch < branches; ++branch)
        for (std::int64_t g = 0; g < shape.groups; ++g)
            for (std::int64_t c = 0; c < channels; ++c) {
                double sum = 0, product = 0;
                for (std::int64_t k = 0; k < part.chunks; ++k) {
                    const double* const t = totals.get() + (g * part.chunks + k) * 3 * channels + c;
                    sum += t[0];
                    product += t[(1 + branch) * channels];
                }
                const std::int64_t cell = branch * 2 * num_stats + g * channels + c;
                const double rstd = call.stats[cell + num_stats], mean_scale = rstd / static_cast<double>(part.rows);
                lines[cell] = static_cast<float>(sum * mean_scale);
                lines[cell + num_stats] = static_cast<float>(product * rstd * rstd * mean_scale);
            }
    const auto line_at = [&](int branch, std::int64_t task) -> Line {
        const float* const line = lines.get() + branch * 2 * num_stats + part.group(task) * channels;
        return {line, line + num_stats};
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t task = 0; task < part.tasks; ++task) {
        const std::int64_t at = part.offset(task);
        const T* const e = (adds ? call.dshortcut : grad) + at;
        gradient_chunk(part.chunk(task), !adds && !pools, e, branch_of(0, call.x, task), line_at(0, task), call.dx + at);
        if (kind == Shortcut::normalised)  // in place, once dx has been made of it
            gradient_chunk(part.chunk(task), false, e, branch_of(1, call.shortcut, task), line_at(1, task), call.dshortcut + at);
    }
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
void norm_relu_backward(const NormShape& shape, Shortcut kind, const NormBackward<float>& call, int threads) {
    backward(shape, kind, call, threads);
}
void norm_relu_backward(const NormShape& shape, Shortcut kind, const NormBackward<std::uint16_t>& call, int threads) {
    backward(shape, kind, call, threads);
}

}  // namespace bmsn
