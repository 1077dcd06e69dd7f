// Pairs of vectors: 32 values of float32 or bfloat16 at a time, computed in float32 by plain vector extensions.
// Source files include it whose functions inline everything here for the instruction set they are compiled for.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#define BMSN_INLINE inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed by value between inlined functions alone

namespace bmsn {
namespace {

using Floats = float __attribute__((vector_size(64)));
using Words = std::uint32_t __attribute__((vector_size(64)));

// What is loaded, computed and stored at a time: for bfloat16 the even and the odd values of 64 bytes (a shift and a mask
// convert them, where widening in order would shuffle: 1.5 times as fast), for float32 two vectors one after the other.
struct Pair {
    Floats a, b;
};

BMSN_INLINE Pair operator+(const Pair& x, const Pair& y) { return {x.a + y.a, x.b + y.b}; }
BMSN_INLINE Pair operator-(const Pair& x, const Pair& y) { return {x.a - y.a, x.b - y.b}; }
BMSN_INLINE Pair operator*(const Pair& x, const Pair& y) { return {x.a * y.a, x.b * y.b}; }
BMSN_INLINE Pair where_positive(const Pair& y, const Pair& x) {  // or NaN
    return {y.a <= 0.f ? Floats{} : x.a, y.b <= 0.f ? Floats{} : x.b};
}

constexpr std::int64_t kPair = 32;

constexpr Words kIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Where the lanes of a pair stand in memory: a's `stride` apart, b's `behind` them.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
    static constexpr std::uint32_t stride = 1, behind = 16;
    BMSN_INLINE static Pair from_memory_order(const Pair& x) { return x; }
    BMSN_INLINE static Pair to_memory_order(const Pair& x) { return x; }
};
template <>
struct Lanes<std::uint16_t> {
    static constexpr std::uint32_t stride = 2, behind = 1;
    BMSN_INLINE static Pair from_memory_order(const Pair& x) {
        return {__builtin_shufflevector(x.a, x.b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                __builtin_shufflevector(x.a, x.b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
    }
    BMSN_INLINE static Pair to_memory_order(const Pair& x) {
        return {__builtin_shufflevector(x.a, x.b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                __builtin_shufflevector(x.a, x.b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
    }
};

BMSN_INLINE Pair load(const float* from) {
    Pair x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

BMSN_INLINE Pair load(const std::uint16_t* from) {
    Words both;
    std::memcpy(&both, from, sizeof both);
    return {(Floats)(both << 16), (Floats)(both & 0xffff0000)};
}

BMSN_INLINE void store(float* to, const Pair& x) { std::memcpy(to, &x, sizeof x); }

// To bfloat16 in the upper half: nearest, ties to even. A NaN stays one: out of bfloat16 values and their statistics it has
// zeros in its lower half, so that rounding does not carry.
BMSN_INLINE Words rounded(const Floats& x) {
    const Words bits = (Words)x;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

BMSN_INLINE void store(std::uint16_t* to, const Pair& x) {
    const Words both = (rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000);
    std::memcpy(to, &both, sizeof both);
}

// One value.
BMSN_INLINE float widened(float x) { return x; }
BMSN_INLINE float widened(std::uint16_t x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }
BMSN_INLINE void narrow(float& to, float x) { to = x; }
BMSN_INLINE void narrow(std::uint16_t& to, float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    to = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The same as above for the ragged end of a chunk, `count` values; a load fills up with 0.
template <typename T>
BMSN_INLINE Pair load(const T* from, std::int64_t count) {
    if (count == kPair) return load(from);
    T padded[kPair] = {};
    std::copy_n(from, count, padded);
    return load(padded);
}

template <typename T>
BMSN_INLINE void store(T* to, std::int64_t count, const Pair& x) {
    if (count == kPair) return store(to, x);
    T padded[kPair];
    store(padded, x);
    std::copy_n(padded, count, to);
}

// 0 in the lanes that hold no value.
template <typename T>
BMSN_INLINE Pair only(std::int64_t count, const Pair& x) {
    if (count == kPair) return x;
    const Words a = kIndex * Lanes<T>::stride, b = a + Lanes<T>::behind;
    const auto limit = static_cast<std::uint32_t>(count);
    return {a < limit ? x.a : Floats{}, b < limit ? x.b : Floats{}};
}

}  // namespace
}  // namespace bmsn
