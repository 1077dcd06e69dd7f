// Philox-4x32-10: four random words as a pure function of a key and a counter.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". bmsn.rng.philox is the same in torch.
#pragma once

#include <array>
#include <cstdint>

namespace bmsn {

inline std::array<std::uint32_t, 4> philox(std::uint64_t key, std::array<std::uint32_t, 4> counter) {
    auto key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0], b = std::uint64_t{0xCD9E8D57} * counter[2];
        counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(b),
                   static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(a)};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

// Uniform in 0..count-1, up to count / 2^32.
inline std::uint32_t below(std::uint32_t count, std::uint32_t word) {
    return static_cast<std::uint32_t>(std::uint64_t{count} * word >> 32);
}

}  // namespace bmsn
