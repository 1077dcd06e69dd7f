// Balanced assignment of architectures (rows) to supernets (columns), and the search's per-step use of it.
//
// z[c,m] = score[c,m] / temperature. Wanted: potentials g with p(m|c) = softmax_m(z[c,m] + g[m]) whose mean over the rows,
// weighted by how often each is drawn, is uniform. They minimise the convex semi-dual
// F(g) = mean_c logsumexp_m(z[c,m] + g[m]) - mean_m g[m]. Damped Newton:
//   - F satisfies |F'''[d,d,d]| <= osc(d) F''[d,d] (osc = largest minus smallest entry), so a full step decreases F where
//     osc(d) <= 1 and a step of log(1 + osc) / osc always does: no line search, no function values.
//   - F'' is the Laplacian of a graph on the columns with the weights mean_c p(m|c) p(n|c) >= 0. Eliminating it as a graph
//     (weights are only ever added) keeps weights of 1e-30 exact to a relative rounding, where diag(p) - p p^T loses them.
//   - Cold, the temperature falls by a factor of 4 a stage and g grows with it. A stage ends when the Newton step is
//     below 1: a distance in g, which scales with z. (The KL does not: at low temperature it can be small far away.)
// All arithmetic is plain IEEE (no contraction) in an order that doesn't depend on the vector width: every instruction
// set gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

namespace bmsn {

enum class BalanceStatus { solved, not_finite, spread_too_large, iteration_cap };

struct BalanceResult {
    BalanceStatus status = BalanceStatus::solved;
    double kl = 0;           // KL(mean_c p(m|c) || uniform), nats
    int iterations = 0;      // evaluations of p, all stages together
    double spread = 0;       // largest max_m z - min_m z of a row
    std::int64_t row = -1;   // the cell that is not finite
    std::int64_t col = -1;
};

constexpr double kLargestSpread = 1e7;  // where rounding of z + g alone reaches 1e-9: no tolerance could be promised

struct alignas(64) Block {
    double lane[8];
};

class BalanceSolver {
   public:
    BalanceSolver(std::int64_t rows, std::int64_t cols);

    std::int64_t rows() const { return rows_; }
    std::int64_t cols() const { return cols_; }

    // How often each row is drawn: rows positive values of mean 1; null: equally often, as after construction.
    void weigh_rows(const double* weights);

    // Solves for g; allocates nothing. scores[c * row_stride + m * col_stride]; g: cols values, in: the warm start if
    // `warm`, out: the solution, mean zero, unchanged unless solved.
    BalanceResult solve(const double* scores, std::int64_t row_stride, std::int64_t col_stride, double inverse_temperature,
                        double tol, int max_iterations, bool warm, double* g);

    void copy_probabilities(double* out) const;  // p(m|c) of the last solve, (rows, cols)

   private:
    bool newton(double scale, double tol, int limit, bool last_stage, BalanceResult& result);
    double newton_direction();

    std::int64_t rows_, cols_, blocks_;     // blocks of 8 rows
    std::vector<Block> z_, p_, column_sum_;  // z_: (cols, blocks), <= 0 with a 0 in each row; column_sum_: (cols)
    std::vector<Block> root_weight_;         // (blocks): roots of the rows' weights, 0 for padding. p_ has rows times them:
                                             // the products of two of its columns are weighted
    std::vector<double> g_, mean_, step_, ground_, pivot_;  // (cols)
    std::vector<double> laplacian_;                         // (cols, cols), upper triangle: weights of the graph
};

// a[c,m], potentials and counters of a search, in arrays that the caller owns, and the step on them.
class MixtureStep {
   public:
    struct Settings {
        std::int64_t num_architectures, num_supernets;
        double ema_decay, tol;
        int balance_every, max_iterations;
    };
    enum Failure : int { bad_accuracy = -1, unsolved = -2, bad_argument = -3 };

    // scores: (M, C), so that the rows of a column are contiguous; visits, last_visit: (C, M); potentials: (M);
    // weights: (C), copied, as BalanceSolver's.
    MixtureStep(const Settings& settings, const double* weights, double* scores, double* potentials, std::int64_t* visits,
                std::int64_t* last_visit);

    // Moves a[c,m] towards `accuracy`, balances where it is due, draws the supernet of `next`; a Failure is negative.
    int observe_and_draw(std::int64_t architecture, std::int64_t supernet, double accuracy, double inverse_temperature,
                         std::int64_t next, double uniform);
    int skip_and_draw(double inverse_temperature, std::int64_t next, double uniform);
    int balance_and_draw(double inverse_temperature, std::int64_t next, double uniform);

    std::int64_t steps = 0;  // calls of observe_and_draw and skip_and_draw
    BalanceResult last;      // of the latest solve

   private:
    bool is_drawable(double inverse_temperature, std::int64_t next, double uniform) const;
    int draw(double inverse_temperature, std::int64_t next, double uniform);

    Settings settings_;
    double *scores_, *potentials_;
    std::int64_t *visits_, *last_visit_;
    BalanceSolver solver_;
    std::vector<Block> row_;  // p(m|next), (M) padded to whole blocks
};

}  // namespace bmsn
