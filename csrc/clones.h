// Copies of a function for several instruction sets, of which the best is chosen when the library is loaded.
#pragma once

// (the sanitizers' run-time is not up yet when a clone is chosen)
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define BMSN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BMSN_CLONES
#endif

// The same with fused multiply-add, for what calls std::fma.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define BMSN_FMA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BMSN_FMA_CLONES
#endif
