#include "balance.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#define BMSN_INLINE inline __attribute__((always_inline))

namespace bmsn {
namespace {

// Vectors as wide as an instruction set's registers (wider ones compile to code 20 times as slow). A block of 8 rows is
// one, two or four of them; sums are kept lane by lane over blocks, so that the width never changes their order.
struct Wide {
    static constexpr int width = 8;
    using Reals = double __attribute__((vector_size(64), may_alias));
    using Bits = std::uint64_t __attribute__((vector_size(64), may_alias));
};
struct Half {
    static constexpr int width = 4;
    using Reals = double __attribute__((vector_size(32), may_alias));
    using Bits = std::uint64_t __attribute__((vector_size(32), may_alias));
};
struct Quarter {
    static constexpr int width = 2;
    using Reals = double __attribute__((vector_size(16), may_alias));
    using Bits = std::uint64_t __attribute__((vector_size(16), may_alias));
};

constexpr double kStageFactor = 4;     // 8 saves a few iterations at 1e6, 4 is safer; a power of two: g scales exactly
constexpr double kFirstSpread = 4;     // of the first stage: there g = 0 is near enough
constexpr double kStageTol = 1e-14;    // a stage that is solved this well is over, whatever its Newton step
constexpr int kWarmIterations = 12;    // after that a warm start is taken to be a bad one
constexpr double kGround = 1e-15;      // joins every column to the ground: columns that share no row stay solvable
constexpr double kSmallestExponent = -345;  // exp below it counts as 0, so that no product of two is denormal (slow)

template <class V>
BMSN_INLINE typename V::Reals& at(double* x) {
    return *reinterpret_cast<typename V::Reals*>(x);
}
template <class V>
BMSN_INLINE const typename V::Reals& at(const double* x) {
    return *reinterpret_cast<const typename V::Reals*>(x);
}

// exp of x <= 0, in place; at most 2 units in the last place off.
// x = n log 2 + r, |r| <= log(2)/2; then 1 + r + r^2 q(r), q of degree 9 through the Chebyshev nodes (2e-17 off), by
// Estrin's scheme.
template <class V>
BMSN_INLINE void exp_in_place(typename V::Reals& x) {
    using Reals = typename V::Reals;
    using Bits = typename V::Bits;
    const double shift = 0x1.8p52;  // adding it rounds to an integer, which then stands in the lowest bits
    const Reals shifted = x * 0x1.71547652b82fep0 + shift;
    const Reals n = shifted - shift;
    const Reals r = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;  // n times the first part of log 2 is exact
    const Reals r2 = r * r;
    const Reals r4 = r2 * r2;
    const Reals low = (0x1p-1 + r * 0x1.5555555555556p-3) + r2 * (0x1.5555555553d63p-5 + r * 0x1.11111111109b3p-7);
    const Reals middle = (0x1.6c16c1788bd9p-10 + r * 0x1.a01a01a7c41d5p-13) +
                         r2 * (0x1.a019b90d2ae7ap-16 + r * 0x1.71de0dae63bb3p-19);
    const Reals high = 0x1.289185613a3d6p-22 + r * 0x1.af38a9b0ec855p-26;
    const Reals value = 1. + (r + r2 * (low + r4 * (middle + r4 * high)));
    const Reals scaled = (Reals)((Bits)value + ((Bits)shifted << 52));
    x = x < kSmallestExponent ? Reals{} : scaled;
}

double sum_lanes(const Block& x) {
    return ((x.lane[0] + x.lane[4]) + (x.lane[1] + x.lane[5])) + ((x.lane[2] + x.lane[6]) + (x.lane[3] + x.lane[7]));
}

// z[m][c] = score[c * row_stride + m * col_stride], rows side by side.
void load(const double* scores, std::int64_t row_stride, std::int64_t col_stride, std::int64_t rows, std::int64_t cols,
          std::int64_t blocks, Block* z) {
    for (std::int64_t begin = 0; begin < rows; begin += 8) {
        const std::int64_t count = std::min<std::int64_t>(8, rows - begin);
        for (std::int64_t m = 0; m < cols; ++m) {
            const double* const from = scores + begin * row_stride + m * col_stride;
            double* const to = z[m * blocks + begin / 8].lane;
            for (std::int64_t c = 0; c < count; ++c) to[c] = from[c * row_stride];
        }
    }
}

// The three passes over a table of 8 * blocks rows: z and p are (cols, stride = 8 * blocks).

// z[m][c] = (z[m][c] - max_m z[m][c]) * inverse_temperature; lowest: the smallest z, lane by lane. Returns whether
// all are finite.
template <class V>
BMSN_INLINE bool centre_rows(std::int64_t cols, std::int64_t stride, double inverse_temperature, double* z,
                             Block& lowest) {
    using Reals = typename V::Reals;
    Block not_finite{};  // 0, or NaN for good
    lowest = {};
    for (std::int64_t c = 0; c < stride; c += V::width) {
        Reals top = at<V>(z + c);
        for (std::int64_t m = 1; m < cols; ++m) {
            const Reals x = at<V>(z + m * stride + c);
            top = x > top ? x : top;
        }
        Reals low = at<V>(lowest.lane + c % 8);
        Reals bad = at<V>(not_finite.lane + c % 8);
        for (std::int64_t m = 0; m < cols; ++m) {
            Reals& x = at<V>(z + m * stride + c);
            bad += x - x;
            x = (x - top) * inverse_temperature;
            low = x < low ? x : low;
        }
        at<V>(lowest.lane + c % 8) = low;
        at<V>(not_finite.lane + c % 8) = bad;
    }
    return sum_lanes(not_finite) == 0;
}

// p[m][c] = root_weight[c] softmax_m(scale * z[m][c] + g[m]); column_sum[m]: the weighted sums over the rows, lane by lane.
template <class V>
BMSN_INLINE void softmax_rows(const double* z, const double* g, double scale, const double* root_weight,
                              std::int64_t cols, std::int64_t stride, double* p, Block* column_sum) {
    using Reals = typename V::Reals;
    std::fill_n(column_sum, cols, Block{});
    for (std::int64_t c = 0; c < stride; c += V::width) {
        Reals top = at<V>(z + c) * scale + g[0];
        at<V>(p + c) = top;
        for (std::int64_t m = 1; m < cols; ++m) {
            const Reals x = at<V>(z + m * stride + c) * scale + g[m];
            at<V>(p + m * stride + c) = x;
            top = x > top ? x : top;
        }
        Reals sum{};
        for (std::int64_t m = 0; m < cols; ++m) {
            Reals x = at<V>(p + m * stride + c) - top;
            exp_in_place<V>(x);
            at<V>(p + m * stride + c) = x;
            sum += x;
        }
        const Reals root = at<V>(root_weight + c);
        const Reals inverse = root / sum;
        for (std::int64_t m = 0; m < cols; ++m) {
            const Reals x = at<V>(p + m * stride + c) * inverse;
            at<V>(p + m * stride + c) = x;
            at<V>(column_sum[m].lane + c % 8) += x * root;
        }
    }
}

// weights[n] = sum_c p_m[c] p_n[n * stride + c] / rows for `count` columns n side by side: one alone waits for its additions.
template <class V, int count>
BMSN_INLINE void weigh_edges(const double* p_m, const double* p_n, std::int64_t rows, std::int64_t stride,
                             double* weights) {
    Block sums[count];
    for (int first = 0; first < 8; first += V::width) {
        typename V::Reals sum[count] = {};
        for (std::int64_t c = first; c < stride; c += 8)
            for (int n = 0; n < count; ++n) sum[n] += at<V>(p_m + c) * at<V>(p_n + n * stride + c);
        for (int n = 0; n < count; ++n) at<V>(sums[n].lane + first) = sum[n];
    }
    for (int n = 0; n < count; ++n) weights[n] = sum_lanes(sums[n]) / static_cast<double>(rows);
}

// weights[m * cols + n] = sum_c p[m][c] p[n][c] / rows for m < n: the off-diagonal of the Hessian, without its sign.
template <class V>
BMSN_INLINE void weigh_graph(const double* p, std::int64_t rows, std::int64_t cols, std::int64_t stride,
                             double* weights) {
    for (std::int64_t m = 0; m < cols; ++m) {
        std::int64_t n = m + 1;
        const auto edges = [&](auto count) __attribute__((always_inline)) {
            weigh_edges<V, count()>(p + m * stride, p + n * stride, rows, stride, weights + m * cols + n);
            n += count();
        };
        while (n + 4 <= cols) edges(std::integral_constant<int, 4>{});
        while (n + 2 <= cols) edges(std::integral_constant<int, 2>{});
        while (n < cols) edges(std::integral_constant<int, 1>{});
    }
}

// A version of the passes for each instruction set; the loader chooses once (function multiversioning).
#define BMSN_PASSES(TARGET, V)                                                                                        \
    TARGET bool centre(std::int64_t cols, std::int64_t stride, double inverse_temperature, double* z, Block& lowest) {\
        return centre_rows<V>(cols, stride, inverse_temperature, z, lowest);                                          \
    }                                                                                                                 \
    TARGET void softmax(const double* z, const double* g, double scale, const double* root_weight, std::int64_t cols, \
                        std::int64_t stride, double* p, Block* column_sum) {                                          \
        softmax_rows<V>(z, g, scale, root_weight, cols, stride, p, column_sum);                                       \
    }                                                                                                                 \
    TARGET void graph_weights(const double* p, std::int64_t rows, std::int64_t cols, std::int64_t stride,             \
                              double* weights) {                                                                      \
        weigh_graph<V>(p, rows, cols, stride, weights);                                                               \
    }

#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
BMSN_PASSES(__attribute__((target("default"))), Quarter)
BMSN_PASSES(__attribute__((target("avx2"))), Half)
BMSN_PASSES(__attribute__((target("avx512f"))), Wide)
#else  // (the sanitizers' run-time is not up yet when a version is chosen)
BMSN_PASSES(, Quarter)
#endif

// (1 + d) log(1 + d) - d, without cancellation.
double divergence(double d) {
    if (std::abs(d) < 1e-3) return d * d * (1. / 2 - d * (1. / 6 - d * (1. / 12 - d * (1. / 20))));
    return d > -1 ? (1 + d) * std::log1p(d) - d : 1;
}

}  // namespace

BalanceSolver::BalanceSolver(std::int64_t rows, std::int64_t cols)
    : rows_(rows), cols_(cols), blocks_((rows + 7) / 8), z_(cols * blocks_), p_(cols * blocks_), column_sum_(cols),
      root_weight_(blocks_), g_(cols), mean_(cols), step_(cols), ground_(cols), pivot_(cols), laplacian_(cols * cols) {
    weigh_rows(nullptr);
}

void BalanceSolver::weigh_rows(const double* weights) {
    for (std::int64_t c = 0; c < rows_; ++c) root_weight_[c / 8].lane[c % 8] = weights ? std::sqrt(weights[c]) : 1;
}

// Solves (laplacian + kGround) step = 1/cols - mean; returns the osc of the step.
double BalanceSolver::newton_direction() {
    graph_weights(p_.data()->lane, rows_, cols_, 8 * blocks_, laplacian_.data());
    for (std::int64_t m = 0; m < cols_; ++m) {
        step_[m] = 1 / static_cast<double>(cols_) - mean_[m];
        ground_[m] = kGround;
    }
    for (std::int64_t k = 0; k < cols_; ++k) {  // eliminating k joins its neighbours to each other and to the ground
        double* const from_k = &laplacian_[k * cols_];
        double pivot = ground_[k];
        for (std::int64_t n = k + 1; n < cols_; ++n) pivot += from_k[n];
        pivot_[k] = 1 / pivot;
        for (std::int64_t m = k + 1; m < cols_; ++m) {
            const double share = from_k[m] * pivot_[k];
            for (std::int64_t n = m + 1; n < cols_; ++n) laplacian_[m * cols_ + n] += share * from_k[n];
            ground_[m] += share * ground_[k];
            step_[m] += share * step_[k];
        }
    }
    double sum = 0;
    for (std::int64_t k = cols_ - 1; k >= 0; --k) {
        for (std::int64_t n = k + 1; n < cols_; ++n) step_[k] += laplacian_[k * cols_ + n] * step_[n];
        step_[k] *= pivot_[k];
        sum += step_[k];
    }
    for (double& x : step_) x -= sum / static_cast<double>(cols_);
    const auto [lowest, highest] = std::minmax_element(step_.begin(), step_.end());
    return *highest - *lowest;
}

// Iterates on g_ at scale * z_ until it is solved or `limit` evaluations are spent; returns whether the stage is over.
bool BalanceSolver::newton(double scale, double tol, int limit, bool last_stage, BalanceResult& result) {
    while (result.iterations < limit) {
        softmax(z_.data()->lane, g_.data(), scale, root_weight_.data()->lane, cols_, 8 * blocks_, p_.data()->lane,
                column_sum_.data());
        ++result.iterations;
        result.kl = 0;
        for (std::int64_t m = 0; m < cols_; ++m) {
            mean_[m] = sum_lanes(column_sum_[m]) / static_cast<double>(rows_);
            result.kl += divergence(static_cast<double>(cols_) * mean_[m] - 1);
        }
        result.kl /= static_cast<double>(cols_);
        if (result.kl < (last_stage ? tol : std::min(tol, kStageTol))) return true;
        const double osc = newton_direction();
        const double length = osc <= 1 ? 1 : std::log1p(osc) / osc;
        for (std::int64_t m = 0; m < cols_; ++m) g_[m] += length * step_[m];
        if (!last_stage && osc < 1) return true;
    }
    return false;
}

BalanceResult BalanceSolver::solve(const double* scores, std::int64_t row_stride, std::int64_t col_stride,
                                   double inverse_temperature, double tol, int max_iterations, bool warm, double* g) {
    BalanceResult result;
    load(scores, row_stride, col_stride, rows_, cols_, blocks_, z_.data());
    Block lowest;
    const bool finite = centre(cols_, 8 * blocks_, inverse_temperature, z_.data()->lane, lowest);
    result.spread = -*std::min_element(lowest.lane, lowest.lane + 8);
    if (!finite) {
        result.status = BalanceStatus::not_finite;
        for (std::int64_t cell = rows_ * cols_ - 1; cell >= 0; --cell)
            if (!std::isfinite(scores[cell / cols_ * row_stride + cell % cols_ * col_stride])) {
                result.row = cell / cols_;
                result.col = cell % cols_;
            }
        return result;
    }
    if (!(result.spread <= kLargestSpread)) {
        result.status = BalanceStatus::spread_too_large;
        return result;
    }
    if (warm) std::copy_n(g, cols_, g_.begin());
    bool solved = warm && newton(1, tol, std::min(kWarmIterations, max_iterations), true, result);
    if (!solved) {
        std::fill(g_.begin(), g_.end(), 0.);
        double scale = 1;
        while (scale * result.spread > kFirstSpread) scale /= kStageFactor;
        while (scale < 1 && newton(scale, tol, max_iterations, false, result)) {
            scale *= kStageFactor;
            for (double& x : g_) x *= kStageFactor;
        }
        solved = scale == 1 && newton(1, tol, max_iterations, true, result);
    }
    if (!solved) {
        result.status = BalanceStatus::iteration_cap;
        return result;
    }
    double sum = 0;
    for (const double x : g_) sum += x;
    for (std::int64_t m = 0; m < cols_; ++m) g[m] = g_[m] - sum / static_cast<double>(cols_);
    return result;
}

void BalanceSolver::copy_probabilities(double* out) const {
    for (std::int64_t begin = 0; begin < rows_; begin += 8)
        for (std::int64_t m = 0; m < cols_; ++m)
            for (std::int64_t c = begin; c < std::min(begin + 8, rows_); ++c)
                out[c * cols_ + m] =
                    p_[m * blocks_ + begin / 8].lane[c - begin] / root_weight_[begin / 8].lane[c - begin];
}

MixtureStep::MixtureStep(const Settings& settings, const double* weights, double* scores, double* potentials,
                         std::int64_t* visits, std::int64_t* last_visit)
    : settings_(settings), scores_(scores), potentials_(potentials), visits_(visits), last_visit_(last_visit),
      solver_(settings.num_architectures, settings.num_supernets), row_((settings.num_supernets + 7) / 8) {
    solver_.weigh_rows(weights);
}

bool MixtureStep::is_drawable(double inverse_temperature, std::int64_t next, double uniform) const {
    return inverse_temperature > 0 && std::isfinite(inverse_temperature) && next >= 0 &&
           next < settings_.num_architectures && uniform >= 0 && uniform < 1;
}

int MixtureStep::observe_and_draw(std::int64_t architecture, std::int64_t supernet, double accuracy,
                                  double inverse_temperature, std::int64_t next, double uniform) {
    const auto [rows, cols, decay, tol, every, cap] = settings_;
    if (architecture < 0 || architecture >= rows || supernet < 0 || supernet >= cols ||
        !is_drawable(inverse_temperature, next, uniform))
        return bad_argument;
    if (!std::isfinite(accuracy)) return bad_accuracy;
    double& score = scores_[supernet * rows + architecture];
    score = decay * score + (1 - decay) * accuracy;
    visits_[architecture * cols + supernet] += 1;
    last_visit_[architecture * cols + supernet] = steps;
    return skip_and_draw(inverse_temperature, next, uniform);
}

int MixtureStep::skip_and_draw(double inverse_temperature, std::int64_t next, double uniform) {
    if (!is_drawable(inverse_temperature, next, uniform)) return bad_argument;
    steps += 1;
    if (steps % settings_.balance_every == 0) return balance_and_draw(inverse_temperature, next, uniform);
    return draw(inverse_temperature, next, uniform);
}

int MixtureStep::balance_and_draw(double inverse_temperature, std::int64_t next, double uniform) {
    if (!is_drawable(inverse_temperature, next, uniform)) return bad_argument;
    last = solver_.solve(scores_, 1, settings_.num_architectures, inverse_temperature, settings_.tol,
                         settings_.max_iterations, true, potentials_);
    return last.status == BalanceStatus::solved ? draw(inverse_temperature, next, uniform) : unsolved;
}

// The first m whose cumulative p(m|next) is above `uniform`, from the scores and potentials as they stand.
int MixtureStep::draw(double inverse_temperature, std::int64_t next, double uniform) {
    const std::int64_t cols = settings_.num_supernets;
    double* const p = row_.data()->lane;
    row_.back() = {};  // the padding too has an exp taken
    for (std::int64_t m = 0; m < cols; ++m)
        p[m] = scores_[m * settings_.num_architectures + next] * inverse_temperature + potentials_[m];
    const double top = *std::max_element(p, p + cols);
    for (std::int64_t m = 0; m < cols; ++m) p[m] -= top;
    double sum = 0;
    for (std::int64_t m = 0; m < cols; m += Quarter::width) exp_in_place<Quarter>(at<Quarter>(p + m));
    for (std::int64_t m = 0; m < cols; ++m) sum += p[m];
    const double threshold = uniform * sum;
    double cumulative = 0;
    int drawn = 0;  // the last one with p > 0, where rounding leaves the threshold above the whole sum
    for (std::int64_t m = 0; m < cols; ++m) {
        if (p[m] > 0) drawn = static_cast<int>(m);
        cumulative += p[m];
        if (threshold < cumulative) break;
    }
    return drawn;
}

}  // namespace bmsn
