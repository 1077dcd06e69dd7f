// Python bindings of bmsn._C: one bind_<op> function for each op, called below. Algorithms know nothing of Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "augment.h"
#include "balance.h"
#include "conv_forward.h"
#include "conv_gradient.h"
#include "cross_entropy.h"
#include "norm_relu.h"
#include "sgd.h"

namespace py = pybind11;

namespace {

using DoubleArray = py::array_t<double, py::array::c_style | py::array::forcecast>;

py::tuple as_tuple(const bmsn::BalanceResult& result) {
    return py::make_tuple(static_cast<int>(result.status), result.kl, result.iterations, result.spread, result.row, result.col);
}

py::tuple balance(const DoubleArray& scores, double inverse_temperature, double tol, int max_iterations,
                  const std::optional<DoubleArray>& warm_start, const std::optional<DoubleArray>& weights) {
    if (scores.ndim() != 2 || scores.size() == 0) throw py::value_error("scores: not (C, M)");
    const py::ssize_t rows = scores.shape(0), cols = scores.shape(1);
    if (warm_start && (warm_start->ndim() != 1 || warm_start->shape(0) != cols)) throw py::value_error("warm_start: not (M,)");
    if (weights && (weights->ndim() != 1 || weights->shape(0) != rows)) throw py::value_error("weights: not (C,)");
    thread_local std::unique_ptr<bmsn::BalanceSolver> solver;  // the workspace of this thread's last shape
    if (!solver || solver->rows() != rows || solver->cols() != cols) solver = std::make_unique<bmsn::BalanceSolver>(rows, cols);
    solver->weigh_rows(weights ? weights->data() : nullptr);
    py::array_t<double> probabilities({rows, cols}), potentials(cols);
    double *const p = probabilities.mutable_data(), *const g = potentials.mutable_data();
    const double* const in = scores.data();
    if (warm_start) std::copy_n(warm_start->data(), cols, g);
    bmsn::BalanceResult result;
    {
        py::gil_scoped_release nogil;
        result = solver->solve(in, cols, 1, inverse_temperature, tol, max_iterations, warm_start.has_value(), g);
        if (result.status == bmsn::BalanceStatus::solved) solver->copy_probabilities(p);
    }
    return py::make_tuple(probabilities, potentials, as_tuple(result));
}

void bind_balance(py::module_& m) {
    m.def("balance", &balance, py::arg("scores"), py::arg("inverse_temperature"), py::arg("tol"), py::arg("max_iterations"),
          py::arg("warm_start") = py::none(), py::arg("weights") = py::none());

    using bmsn::MixtureStep;
    using Doubles = py::array_t<double, py::array::c_style>;
    using Counters = py::array_t<std::int64_t, py::array::c_style>;
    const auto make = [](double ema_decay, double tol, int balance_every, int max_iterations, const Doubles& weights,
                         Doubles scores, Doubles potentials, Counters visits, Counters last_visit) {
        const bool fit = scores.ndim() == 2 && visits.ndim() == 2 && last_visit.ndim() == 2 && scores.size() > 0 &&
                         visits.shape(0) == scores.shape(1) && visits.shape(1) == scores.shape(0) &&
                         last_visit.shape(0) == scores.shape(1) && last_visit.shape(1) == scores.shape(0) &&
                         potentials.ndim() == 1 && potentials.shape(0) == scores.shape(0) && balance_every > 0 &&
                         weights.ndim() == 1 && weights.shape(0) == scores.shape(1);
        if (!fit) throw py::value_error("MixtureStep: the shapes do not fit");
        return MixtureStep({scores.shape(1), scores.shape(0), ema_decay, tol, balance_every, max_iterations}, weights.data(),
                           scores.mutable_data(), potentials.mutable_data(), visits.mutable_data(), last_visit.mutable_data());
    };
    py::class_<MixtureStep>(m, "MixtureStep")
        .def(py::init(make), py::arg("ema_decay"), py::arg("tol"), py::arg("balance_every"), py::arg("max_iterations"),
             py::arg("weights"), py::arg("scores").noconvert(), py::arg("potentials").noconvert(),
             py::arg("visits").noconvert(), py::arg("last_visit").noconvert(), py::keep_alive<1, 7>(),
             py::keep_alive<1, 8>(), py::keep_alive<1, 9>(), py::keep_alive<1, 10>())
        .def("observe_and_draw", &MixtureStep::observe_and_draw)  // 1 us: the GIL stays held, which also guards the arrays
        .def("skip_and_draw", &MixtureStep::skip_and_draw)
        .def("balance_and_draw", &MixtureStep::balance_and_draw)
        .def_readwrite("steps", &MixtureStep::steps)
        .def_property_readonly("last", [](const MixtureStep& self) { return as_tuple(self.last); });
}

// Addresses come from bmsn.ops.batches, whose callers have checked dtypes, shapes, layout and the range of the indices.
void bind_augment(py::module_& m) {
    using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
    const auto call = [](std::uintptr_t images, const Shape& shape, std::uintptr_t indices, std::uint64_t key,
                         const std::optional<std::uint64_t>& step, std::int64_t padding, std::uintptr_t table,
                         std::uintptr_t out, bool bfloat16) {
        const auto [num_images, height, width, channels] = shape;
        const bmsn::Draws draws{key, step.value_or(0), padding};
        const auto run = [&](auto* to) {
            bmsn::augment(reinterpret_cast<const std::uint8_t*>(images), {num_images, height, width, channels},
                          reinterpret_cast<const std::int64_t*>(indices), step ? &draws : nullptr,
                          reinterpret_cast<decltype(to)>(table), to);
        };
        bfloat16 ? run(reinterpret_cast<std::uint16_t*>(out)) : run(reinterpret_cast<float*>(out));
    };
    m.def("augment", call, py::call_guard<py::gil_scoped_release>());
}

// Addresses (0: not there) come from bmsn.ops.norm_relu, which has checked dtypes, shapes and layout and made the outputs.
void bind_norm_relu(py::module_& m) {
    using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;  // groups, rows, channels
    const auto forward = [](const Shape& shape, bool bfloat16, bmsn::Shortcut kind, std::uintptr_t x, std::uintptr_t shortcut,
                            std::uintptr_t y, std::uintptr_t stats, bool known, std::uintptr_t affine, std::uintptr_t index,
                            bmsn::Pool pool, std::int64_t width, double eps, int threads) {
        const auto [groups, rows, channels] = shape;
        const auto run = [&]<typename T>(T) {
            const bmsn::NormForward<T> call{reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(shortcut),
                                            reinterpret_cast<T*>(y),       reinterpret_cast<float*>(stats), known,
                                            reinterpret_cast<const float*>(affine), reinterpret_cast<std::uint8_t*>(index),
                                            pool, width};
            bmsn::norm_relu({groups, rows, channels}, kind, call, eps, threads);
        };
        bfloat16 ? run(std::uint16_t{}) : run(float{});
    };
    const auto statistics = [](const Shape& shape, bool bfloat16, std::uintptr_t x, std::uintptr_t stats, double eps, int threads) {
        const auto [groups, rows, channels] = shape;
        const auto run = [&]<typename T>(T) {
            bmsn::batch_statistics({groups, rows, channels}, reinterpret_cast<const T*>(x), reinterpret_cast<float*>(stats), eps,
                                   threads);
        };
        bfloat16 ? run(std::uint16_t{}) : run(float{});
    };
    const auto apply = [](const Shape& shape, bool bfloat16, bmsn::Shortcut kind, std::uintptr_t x, std::uintptr_t shortcut,
                          std::uintptr_t stats, std::uintptr_t shortcut_stats, std::uintptr_t full, std::uintptr_t pooled,
                          bmsn::Pool pool, std::int64_t width, int threads) {
        const auto [groups, rows, channels] = shape;
        const auto run = [&]<typename T>(T) {
            const bmsn::NormApply<T> call{reinterpret_cast<const T*>(x),         reinterpret_cast<const T*>(shortcut),
                                          reinterpret_cast<const float*>(stats), reinterpret_cast<const float*>(shortcut_stats),
                                          nullptr,                               nullptr,
                                          reinterpret_cast<T*>(full),            reinterpret_cast<T*>(pooled),
                                          nullptr,                               pool,
                                          width};
            bmsn::norm_add_relu_pool({groups, rows, channels}, kind, call, threads);
        };
        bfloat16 ? run(std::uint16_t{}) : run(float{});
    };
    const auto backward = [](const Shape& shape, bool bfloat16, bmsn::Shortcut kind, std::uintptr_t grad, std::uintptr_t y,
                             std::uintptr_t x, std::uintptr_t shortcut, std::uintptr_t stats, std::uintptr_t affine,
                             std::uintptr_t dx, std::uintptr_t dshortcut, std::uintptr_t daffine, std::uintptr_t index,
                             bmsn::Pool pool, std::int64_t width, int threads) {
        const auto [groups, rows, channels] = shape;
        const auto run = [&]<typename T>(T) {
            const bmsn::NormBackward<T> call{reinterpret_cast<const T*>(grad), reinterpret_cast<const T*>(y),
                                             reinterpret_cast<const T*>(x),    reinterpret_cast<const T*>(shortcut),
                                             reinterpret_cast<const float*>(stats), reinterpret_cast<const float*>(affine),
                                             reinterpret_cast<T*>(dx),         reinterpret_cast<T*>(dshortcut),
                                             reinterpret_cast<float*>(daffine),
                                             reinterpret_cast<const std::uint8_t*>(index), pool, width};
            bmsn::norm_relu_backward({groups, rows, channels}, kind, call, threads);
        };
        bfloat16 ? run(std::uint16_t{}) : run(float{});
    };
    const auto gradient = [](const Shape& shape, bool bfloat16, std::uintptr_t e, std::uintptr_t x, std::uintptr_t stats,
                             std::uintptr_t line, std::uintptr_t dx, int threads) {
        const auto [groups, rows, channels] = shape;
        const auto run = [&]<typename T>(T) {
            const bmsn::NormGradient<T> call{reinterpret_cast<const T*>(e), reinterpret_cast<const T*>(x),
                                             reinterpret_cast<const float*>(stats), reinterpret_cast<const float*>(line),
                                             reinterpret_cast<T*>(dx)};
            bmsn::norm_gradient({groups, rows, channels}, call, threads);
        };
        bfloat16 ? run(std::uint16_t{}) : run(float{});
    };
    py::enum_<bmsn::Shortcut>(m, "Shortcut")
        .value("none", bmsn::Shortcut::none)
        .value("plain", bmsn::Shortcut::plain)
        .value("normalised", bmsn::Shortcut::normalised);
    py::enum_<bmsn::Pool>(m, "Pool").value("max", bmsn::Pool::max).value("avg", bmsn::Pool::mean);
    m.def("batch_statistics", statistics, py::call_guard<py::gil_scoped_release>());
    m.def("norm_add_relu_pool", apply, py::call_guard<py::gil_scoped_release>());
    m.def("norm_gradient", gradient, py::call_guard<py::gil_scoped_release>());
    m.def("norm_relu", forward, py::call_guard<py::gil_scoped_release>());
    m.def("norm_relu_backward", backward, py::call_guard<py::gil_scoped_release>());
}

// Addresses (0: not there) come from bmsn.ops.conv2d, which has checked dtypes, shapes and layout and made the output.
void bind_conv_gradient(py::module_& m) {
    using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
    const auto call = [](const Shape& shape, bool bfloat16, std::uintptr_t x, std::uintptr_t stats, std::uintptr_t grad,
                         std::uintptr_t dw, int threads) {
        const auto [images, height, width, in_channels, out_channels] = shape;
        const auto run = [&]<typename T>(T) {
            bmsn::conv_weight_gradient({images, height, width, in_channels, out_channels}, reinterpret_cast<const T*>(x),
                                       reinterpret_cast<const float*>(stats), reinterpret_cast<const T*>(grad),
                                       reinterpret_cast<T*>(dw), threads);
        };
        bfloat16 ? run(std::uint16_t{}) : run(float{});
    };
    const auto has = [](bool bfloat16) {
        return bfloat16 ? bmsn::has_conv_weight_gradient(std::uint16_t{}) : bmsn::has_conv_weight_gradient(float{});
    };
    m.def("has_conv_weight_gradient", has);
    m.def("conv_weight_gradient", call, py::call_guard<py::gil_scoped_release>());
}

// Addresses (0: not there) come from bmsn.ops.convolution, which has checked dtypes, shapes and layout and made the outputs.
void bind_conv_forward(py::module_& m) {
    using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
    // kernel, channels, weight, sets, elements between them, transposed, y, its statistics, (scale, shift, shortcut), ReLU,
    // (masked by, its statistics)
    using Branch = std::tuple<std::int64_t, std::int64_t, std::uintptr_t, std::int64_t, std::int64_t, bool, std::uintptr_t,
                              std::uintptr_t, std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>, bool,
                              std::tuple<std::uintptr_t, std::uintptr_t>>;
    const auto call = [](const Shape& shape, bool bfloat16, std::uintptr_t x, std::uintptr_t stats, std::uintptr_t weight_index,
                         const std::vector<Branch>& given, double eps, int threads) {
        const auto [groups, images, height, width, in_channels] = shape;
        const auto* const index = reinterpret_cast<const std::int32_t*>(weight_index);
        const auto run = [&]<typename T>(T) {
            std::vector<bmsn::ConvBranch<T>> branches;
            for (const auto& [kernel, channels, weight, sets, set_stride, transposed, y, of_y, scaled, relu, masked] : given) {
                const auto [scale, shift, shortcut] = scaled;
                const auto [masked_by, masked_stats] = masked;
                if (masked_by && !(of_y && masked_stats)) throw py::value_error("masked_by needs stats and masked_stats");
                for (std::int64_t g = 0; index && g < groups; ++g)
                    if (index[g] < 0 || index[g] >= sets)
                        throw py::index_error("weight_index must be in 0.." + std::to_string(sets - 1) + "; got " +
                                              std::to_string(index[g]));
                branches.push_back({kernel, channels, reinterpret_cast<const T*>(weight), sets, set_stride, transposed,
                                    reinterpret_cast<T*>(y), reinterpret_cast<float*>(of_y), reinterpret_cast<const float*>(scale),
                                    reinterpret_cast<const float*>(shift), reinterpret_cast<const T*>(shortcut), relu,
                                    reinterpret_cast<const T*>(masked_by), reinterpret_cast<const float*>(masked_stats)});
            }
            const py::gil_scoped_release nogil;
            bmsn::conv_forward(bmsn::ConvInput<T>{groups, images, height, width, in_channels, reinterpret_cast<const T*>(x),
                                                  reinterpret_cast<const float*>(stats), index},
                               std::span<const bmsn::ConvBranch<T>>(branches), eps, threads);
        };
        bfloat16 ? run(std::uint16_t{}) : run(float{});
    };
    const auto has = [](bool bfloat16) {
        return bfloat16 ? bmsn::has_conv_forward(std::uint16_t{}) : bmsn::has_conv_forward(float{});
    };
    m.def("has_conv_forward", has);
    m.def("conv_forward", call);
}

// Addresses come from bmsn.ops.cross_entropy, which has checked dtypes, shapes and layout and made the outputs.
void bind_cross_entropy(py::module_& m) {
    const auto call = [](const std::tuple<std::int64_t, std::int64_t>& shape, std::uintptr_t logits, std::uintptr_t labels,
                         std::uintptr_t loss, std::uintptr_t correct, std::uintptr_t gradient, int threads) {
        const auto [images, classes] = shape;
        bmsn::cross_entropy(reinterpret_cast<const float*>(logits), reinterpret_cast<const std::int64_t*>(labels), images,
                            classes, reinterpret_cast<float*>(loss), reinterpret_cast<std::int64_t*>(correct),
                            reinterpret_cast<float*>(gradient), threads);
    };
    m.def("cross_entropy", call, py::call_guard<py::gil_scoped_release>());
}

// Addresses (copies: 0 if there are none) come from bmsn.ops.sgd, which has checked dtypes, shapes and layout.
void bind_sgd(py::module_& m) {
    const auto call = [](const std::tuple<std::int64_t, std::int64_t>& shape, std::uintptr_t weights, std::uintptr_t velocity,
                         std::uintptr_t copies, std::uintptr_t gradient, std::uintptr_t row, std::uintptr_t lr,
                         std::uintptr_t loss, double momentum, double weight_decay, int threads) {
        const auto [rows, size] = shape;
        const std::int64_t chosen = *reinterpret_cast<const std::int64_t*>(row);
        if (chosen < 0 || chosen >= rows)
            throw py::index_error("row must be in 0.." + std::to_string(rows - 1) + "; got " + std::to_string(chosen));
        if (!std::isfinite(*reinterpret_cast<const float*>(loss))) return;
        const std::int64_t at = chosen * size;
        const py::gil_scoped_release nogil;
        bmsn::sgd({*reinterpret_cast<const float*>(lr), static_cast<float>(momentum), static_cast<float>(weight_decay)}, size,
                  reinterpret_cast<const float*>(gradient), reinterpret_cast<float*>(weights) + at,
                  reinterpret_cast<float*>(velocity) + at, copies ? reinterpret_cast<std::uint16_t*>(copies) + at : nullptr,
                  threads);
    };
    m.def("sgd", call);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ backend of bmsn.";
    bind_augment(m);
    bind_balance(m);
    bind_conv_forward(m);
    bind_conv_gradient(m);
    bind_cross_entropy(m);
    bind_norm_relu(m);
    bind_sgd(m);
}
