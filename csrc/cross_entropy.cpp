#include "cross_entropy.h"

#include <cmath>
#include <limits>
#include <memory>

namespace bmsn {
namespace {

constexpr std::int64_t kParallel = 16384;  // logits; fewer are done before other threads wake up

// One image: its loss, whether it is right (torch.argmax: the first NaN if there is one, else the first maximum).
double one_image(const float* logits, std::int64_t label, std::int64_t classes, double share, float* gradient, bool& right) {
    std::int64_t best = 0;
    for (std::int64_t k = 1; k < classes && !std::isnan(logits[best]); ++k)
        if (logits[k] > logits[best] || std::isnan(logits[k])) best = k;
    right = best == label;
    const float top = logits[best];
    double sum = 0;
    for (std::int64_t k = 0; k < classes; ++k) {
        gradient[k] = std::exp(logits[k] - top);
        sum += static_cast<double>(gradient[k]);
    }
    const bool known = label >= 0 && label < classes;
    const double scale = known ? share / sum : 0;
    for (std::int64_t k = 0; k < classes; ++k) gradient[k] = static_cast<float>(static_cast<double>(gradient[k]) * scale);
    if (!known) return std::numeric_limits<double>::quiet_NaN();
    // of the label itself p - 1 is the sum of the others, negated: near p = 1 a difference would keep no digit
    double others = 0;
    for (std::int64_t k = 0; k < classes; ++k)
        if (k != label) others += static_cast<double>(gradient[k]);
    gradient[label] = static_cast<float>(-others);
    return std::log(sum) - static_cast<double>(logits[label] - top);
}

}  // namespace

void cross_entropy(const float* logits, const std::int64_t* labels, std::int64_t images, std::int64_t classes, float* loss,
                   std::int64_t* correct, float* gradient, int threads) {
    const auto losses = std::make_unique_for_overwrite<double[]>(images);
    std::int64_t hits = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : hits) if (images * classes > kParallel)
    for (std::int64_t n = 0; n < images; ++n) {
        bool right;
        losses[n] = one_image(logits + n * classes, labels[n], classes, 1 / static_cast<double>(images), gradient + n * classes, right);
        hits += right;
    }
    double sum = 0;
    for (std::int64_t n = 0; n < images; ++n) sum += losses[n];
    *loss = static_cast<float>(sum / static_cast<double>(images));
    *correct = hits;
}

}  // namespace bmsn
