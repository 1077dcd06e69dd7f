// Memory that begins at a multiple of 64 bytes, not initialised.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace bmsn {

struct AlignedDelete {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

template <typename T>
Buffer<T> make_buffer(std::int64_t size) {
    return Buffer<T>(static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), std::align_val_t{64})));
}

}  // namespace bmsn
