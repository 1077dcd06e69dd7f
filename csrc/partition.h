// How statistics groups are cut into chunks: by the number of channels alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "norm_lanes.h"
#include "norm_relu.h"

namespace bmsn {
namespace {

constexpr std::int64_t kPairs = 2;  // independent sums hide the latency of an addition
constexpr std::int64_t kBlock = kPair * kPairs;
constexpr std::int64_t kChunk = 16384;  // values: 32 KiB of bfloat16 stay in the first-level cache between two sweeps
constexpr std::int64_t kLeastRows = 64;  // of a chunk: a wide layer's totals would otherwise be as large as its map

struct Chunk {
    std::int64_t channels, rows, width;
};

// Rows are laid side by side until they fill whole blocks: block and lane then say the channel, whatever their number.
struct Partition {
    Partition(const NormShape& shape)
        : channels(shape.channels), rows(shape.rows), width(std::lcm(shape.channels, kBlock)),
          chunk_rows(std::max((kLeastRows + width / channels - 1) / (width / channels), kChunk / width) * (width / channels)),
          chunks((rows + chunk_rows - 1) / chunk_rows), tasks(shape.groups * chunks) {}

    std::int64_t group(std::int64_t task) const { return task / chunks; }
    std::int64_t first_row(std::int64_t task) const { return task % chunks * chunk_rows; }
    std::int64_t num_rows(std::int64_t task) const { return std::min(chunk_rows, rows - first_row(task)); }
    Chunk chunk(std::int64_t task) const { return {channels, num_rows(task), width}; }
    std::int64_t offset(std::int64_t task) const { return (group(task) * rows + first_row(task)) * channels; }

    std::int64_t channels, rows, width, chunk_rows, chunks, tasks;
};

}  // namespace
}  // namespace bmsn
