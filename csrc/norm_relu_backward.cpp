#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "clones.h"
#include "norm_relu.h"
#include "norm_sweep.h"
#include "pool_lines.h"

namespace bmsn {
namespace {

// ReLU's mask: there is none (any more), or it is that of the centred x, of norm(x), or of the result.
enum class Mask { none, centred, norm, result };

BMSN_INLINE Mask mask_of(Shortcut kind, bool masked, bool affine) {
    return !masked ? Mask::none : kind != Shortcut::none ? Mask::result : affine ? Mask::norm : Mask::centred;
}

// totals (3, channels): sum of e, sum of e * (x - mean), and the same product for a normalised shortcut.
// With a shortcut e is left in `active`: it is the gradient of a plain one.
template <Shortcut kind, Mask mask, typename T>
BMSN_INLINE void sum_gradients(const Chunk& chunk, const T* grad, const T* y, const Branch<T>& main, const Branch<T>& shortcut,
                               T* active, double* totals) {
    const std::int64_t channels = chunk.channels;
    std::fill_n(totals, 3 * channels, 0.);
    for (std::int64_t column = 0; column < chunk.width; column += kBlock) {
        const Block mean = spread<T>(main.mean, channels, column);
        Block scale{}, shift{}, mean2{}, sum{}, product{}, product2{};
        if constexpr (mask == Mask::norm) {
            scale = spread<T>(main.scale, channels, column);
            shift = spread<T>(main.shift, channels, column);
        }
        if constexpr (kind == Shortcut::normalised) mean2 = spread<T>(shortcut.mean, channels, column);
        sweep(chunk, column, [&](std::int64_t j, std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
            const Pair d = load(main.x + at, count) - mean.at[j];
            Pair e = only<T>(count, load(grad + at, count));
            if constexpr (mask == Mask::centred) e = where_positive(d, e);
            if constexpr (mask == Mask::norm) e = where_positive(d * scale.at[j] + shift.at[j], e);
            if constexpr (mask == Mask::result) e = where_positive(load(y + at, count), e);
            sum.at[j] = sum.at[j] + e;
            product.at[j] = product.at[j] + only<T>(count, e * d);
            if constexpr (kind == Shortcut::normalised)
                product2.at[j] = product2.at[j] + only<T>(count, e * (load(shortcut.x + at, count) - mean2.at[j]));
            if constexpr (mask == Mask::result) store(active + at, count, e);
        });
        fold<T>(sum, channels, column, totals);
        fold<T>(product, channels, column, totals + channels);
        if constexpr (kind == Shortcut::normalised) fold<T>(product2, channels, column, totals + 2 * channels);
    }
}

template <typename T>
BMSN_INLINE void sum_gradients(const Chunk& chunk, Shortcut kind, bool masked, const T* grad, const T* y, const Branch<T>& main,
                               const Branch<T>& shortcut, T* active, double* totals) {
    const auto sum = [&]<Shortcut chosen, Mask mask>() __attribute__((always_inline)) {
        sum_gradients<chosen, mask>(chunk, grad, y, main, shortcut, active, totals);
    };
    const Mask mask = mask_of(kind, masked, main.shift);
    if (kind == Shortcut::none) {
        if (mask == Mask::none) sum.template operator()<Shortcut::none, Mask::none>();
        if (mask == Mask::centred) sum.template operator()<Shortcut::none, Mask::centred>();
        if (mask == Mask::norm) sum.template operator()<Shortcut::none, Mask::norm>();
    } else if (kind == Shortcut::plain) {
        masked ? sum.template operator()<Shortcut::plain, Mask::result>() : sum.template operator()<Shortcut::plain, Mask::none>();
    } else {
        masked ? sum.template operator()<Shortcut::normalised, Mask::result>()
               : sum.template operator()<Shortcut::normalised, Mask::none>();
    }
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

// dx = scale * e - constant - (x - mean) * linear; e = grad, which ReLU masks here where there is no shortcut.
struct Line {
    const float *constant, *linear;
};

template <Mask mask, typename T>
BMSN_INLINE void gradient(const Chunk& chunk, const T* grad, const Branch<T>& branch, Line line, T* dx) {
    const std::int64_t channels = chunk.channels;
    for (std::int64_t column = 0; column < chunk.width; column += kBlock) {
        const Block mean = spread<T>(branch.mean, channels, column), scale = spread<T>(branch.scale, channels, column);
        const Block constant = spread<T>(line.constant, channels, column), linear = spread<T>(line.linear, channels, column);
        Block shift{};
        if constexpr (mask == Mask::norm) shift = spread<T>(branch.shift, channels, column);
        sweep(chunk, column, [&](std::int64_t j, std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
            const Pair d = load(branch.x + at, count) - mean.at[j];
            Pair e = load(grad + at, count);
            if constexpr (mask == Mask::centred) e = where_positive(d, e);
            if constexpr (mask == Mask::norm) e = where_positive(d * scale.at[j] + shift.at[j], e);
            store(dx + at, count, scale.at[j] * e - constant.at[j] - d * linear.at[j]);
        });
    }
}

template <typename T>
BMSN_INLINE void gradient(const Chunk& chunk, Mask mask, const T* grad, const Branch<T>& branch, Line line, T* dx) {
    if (mask == Mask::none) gradient<Mask::none>(chunk, grad, branch, line, dx);
    if (mask == Mask::centred) gradient<Mask::centred>(chunk, grad, branch, line, dx);
    if (mask == Mask::norm) gradient<Mask::norm>(chunk, grad, branch, line, dx);
}

BMSN_CLONES void gradient_chunk(const Chunk& chunk, Mask mask, const float* grad, const Branch<float>& branch, Line line,
                                float* dx) {
    gradient(chunk, mask, grad, branch, line, dx);
}
BMSN_CLONES void gradient_chunk(const Chunk& chunk, Mask mask, const std::uint16_t* grad, const Branch<std::uint16_t>& branch,
                                Line line, std::uint16_t* dx) {
    gradient(chunk, mask, grad, branch, line, dx);
}

template <typename T>
void backward(const NormShape& shape, Shortcut kind, const NormBackward<T>& call, int threads) {
    const Partition part(shape);
    const std::int64_t channels = part.channels, num_stats = shape.groups * channels;
    const auto totals = std::make_unique_for_overwrite<double[]>(part.tasks * 3 * channels);
    const int branches = kind == Shortcut::normalised ? 2 : 1;
    std::vector<Normalisation> norms;
    for (int branch = 0; branch < branches; ++branch)
        norms.emplace_back(shape, call.stats + branch * 2 * num_stats, call.affine ? call.affine + branch * 2 * channels : nullptr);
    const auto branch_of = [&](std::size_t branch, const T* x, std::int64_t task) {
        return norms[branch].at(x, part.group(task), part.offset(task));
    };
    const bool adds = kind != Shortcut::none, pools = call.index != nullptr;
    const T* grad = call.grad;
    if (pools) {  // out of the windows' gradients that of the map, ReLU's mask in it, to where it can stay
        T* const whole = adds ? call.dshortcut : call.dx;
        const std::int64_t unit = 2 * call.width * channels;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (std::int64_t line = 0; line < shape.groups * shape.rows * channels / unit; ++line)
            unpool_lines(call.pool, call.width, channels, call.grad + line * unit / 4,
                         call.pool == Pool::max ? call.y + line * unit / 4 : nullptr, call.index + line * unit / 4,
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
    if (call.daffine) std::fill_n(call.daffine, branches * 2 * channels, 0.f);
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
                const double rstd = call.stats[cell + num_stats];
                const double mean_scale = norms[branch].scale()[g * channels + c] / static_cast<double>(part.rows);
                lines[cell] = static_cast<float>(sum * mean_scale);
                lines[cell + num_stats] = static_cast<float>(product * rstd * rstd * mean_scale);
                if (call.daffine) {
                    float* const daffine = call.daffine + branch * 2 * channels + c;
                    daffine[0] += static_cast<float>(product * rstd);
                    daffine[channels] += static_cast<float>(sum);
                }
            }
    const auto line_at = [&](int branch, std::int64_t task) -> Line {
        const float* const line = lines.get() + branch * 2 * num_stats + part.group(task) * channels;
        return {line, line + num_stats};
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t task = 0; task < part.tasks; ++task) {
        const std::int64_t at = part.offset(task);
        const T* const e = (adds ? call.dshortcut : grad) + at;
        gradient_chunk(part.chunk(task), mask_of(kind, !adds && !pools, call.affine), e, branch_of(0, call.x, task), line_at(0, task), call.dx + at);
        if (kind == Shortcut::normalised)  // in place, once dx has been made of it
            gradient_chunk(part.chunk(task), Mask::none, e, branch_of(1, call.shortcut, task), line_at(1, task), call.dshortcut + at);
    }
}

template <typename T>
void apply_line(const NormShape& shape, const NormGradient<T>& call, int threads) {
    const Partition part(shape);
    const Normalisation norm(shape, call.stats, nullptr);
    const float* const linear = call.line + shape.groups * shape.channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t task = 0; task < part.tasks; ++task) {
        const std::int64_t at = part.offset(task), group = part.group(task);
        const Line line{call.line + group * shape.channels, linear + group * shape.channels};
        gradient_chunk(part.chunk(task), Mask::none, call.e + at, norm.at(call.x, group, at), line, call.dx + at);
    }
}

}  // namespace

void norm_relu_backward(const NormShape& shape, Shortcut kind, const NormBackward<float>& call, int threads) {
    backward(shape, kind, call, threads);
}
void norm_relu_backward(const NormShape& shape, Shortcut kind, const NormBackward<std::uint16_t>& call, int threads) {
    backward(shape, kind, call, threads);
}

void norm_gradient(const NormShape& shape, const NormGradient<float>& call, int threads) { apply_line(shape, call, threads); }
void norm_gradient(const NormShape& shape, const NormGradient<std::uint16_t>& call, int threads) { apply_line(shape, call, threads); }

}  // namespace bmsn
