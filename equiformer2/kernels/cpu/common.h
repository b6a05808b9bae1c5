// Vectors of one register, loads and stores of their numbers, and the sizes that a library is compiled for.
//
// A library holds one source file for one type of GEMM operands and one range of orders (library.py defines the
// macros): ARITHMETIC and OPERAND are the types, LOWEST_ORDER and HIGHEST_ORDER the range.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

struct bf16 {
    uint16_t bits;
};

// A vector wider than a register is taken apart, and what does not fit into registers goes through memory: with AVX2
// alone vectors of 64 bytes made the grid kernels several times slower than torch.
#if defined(__AVX512F__)
static constexpr int64_t register_bytes = 64;
#elif defined(__AVX__)
static constexpr int64_t register_bytes = 32;
#else
static constexpr int64_t register_bytes = 16;
#endif

template <class A>
struct Vector;
template <>
struct Vector<float> {
    static constexpr int64_t width = register_bytes / 4;
    typedef float type __attribute__((vector_size(register_bytes)));
    typedef int32_t integers __attribute__((vector_size(register_bytes)));
    typedef uint32_t words __attribute__((vector_size(register_bytes)));
    typedef uint16_t halves __attribute__((vector_size(register_bytes / 2)));
};
template <>
struct Vector<double> {
    static constexpr int64_t width = register_bytes / 8;
    typedef double type __attribute__((vector_size(register_bytes)));
};
template <class A>
using V = typename Vector<A>::type;

// `count` numbers from `from`, zeros behind them.
template <class A>
static inline V<A> load(const A* from, int64_t count) {
    V<A> v = {};
    if (count >= Vector<A>::width)
        std::memcpy(&v, from, sizeof v);
    else
        std::memcpy(&v, from, count * sizeof(A));
    return v;
}

template <class A>
static inline V<A> load(const bf16* from, int64_t count) {
    Vector<float>::halves h = {};
    if (count >= Vector<float>::width)
        std::memcpy(&h, from, sizeof h);
    else
        std::memcpy(&h, from, count * sizeof(bf16));
    const Vector<float>::words w = __builtin_convertvector(h, Vector<float>::words) << 16;
    V<A> v;
    std::memcpy(&v, &w, sizeof v);
    return v;
}

template <class A>
static inline void store(A* to, V<A> v, int64_t count) {
    if (count >= Vector<A>::width)
        std::memcpy(to, &v, sizeof v);
    else
        std::memcpy(to, &v, count * sizeof(A));
}

// Rounds to the nearest, ties to even; NaN stays NaN.
static inline void store(bf16* to, V<float> v, int64_t count) {
#ifdef __AVX512BF16__
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    Vector<float>::words w;
    std::memcpy(&w, &v, sizeof w);
    const Vector<float>::words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    const Vector<float>::words nan = (w >> 16) | 0x40;
    w = (w & 0x7fffffff) > 0x7f800000 ? nan : rounded;
    const Vector<float>::halves h = __builtin_convertvector(w, Vector<float>::halves);
#endif
    // A copy of known size is one instruction, of unknown size a call.
    if (count >= Vector<float>::width)
        std::memcpy(to, &h, sizeof h);
    else
        std::memcpy(to, &h, count * sizeof(bf16));
}

// Whether results are rounded to so few digits that an error of 2e-4 does not show.
template <class T>
static constexpr bool rough = std::is_same<T, bf16>::value;

// Relative error below 4e-6 for |x| <= 87, below 3e-7 for small x, in rough 2e-4; constant beyond 88; NaN stays NaN.
template <bool few_digits>
static inline V<float> exponential(V<float> x) {
    const float log2e = 1.44269504088896341f;
    const V<float> high = V<float>{} + 88.0f;
    // exp(x) = 2^n 2^f, |f| <= 1/2.
#ifdef __AVX512F__
    // Of a pair with NaN the second is returned.
    const __m512 t = _mm512_min_ps((__m512)high, (__m512)x) * _mm512_set1_ps(log2e);
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const V<float> f = (V<float>)(t - n);
#else
    typedef Vector<float>::integers Bits;
    const V<float> low = V<float>{} - 87.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    // Adding 1.5 * 2^23 rounds to an integer in the low bits.
    const float magic = 12582912.0f;
    const V<float> shifted = x * log2e + magic;
    const V<float> f = x * log2e - (shifted - magic);
#endif
    V<float> p;
    if constexpr (few_digits) {
        // Least largest relative error for degree 3 (7e-05).
        p = f * 0.055171669f + 0.24261112f;
        p = p * f + 0.69326099f;
        p = p * f + 0.99992807f;
    } else {
        // The same for degree 6 (2e-9).
        p = f * 1.5345812e-4f + 1.3399931e-3f;
        p = p * f + 9.6184891e-3f;
        p = p * f + 5.5503286e-2f;
        p = p * f + 0.24022646f;
        p = p * f + 0.69314718f;
        p = p * f + 1.0f;
    }
#ifdef __AVX512F__
    return (V<float>)_mm512_scalef_ps((__m512)p, n);
#else
    Bits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const Bits power = (bits << 23) + 0x3f800000;
    V<float> scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
#endif
}

// For results that are stored as T.
template <class T>
static inline V<double> sigmoid(V<double> x) {
    for (int64_t i = 0; i < Vector<double>::width; ++i) x[i] = 1.0 / (1.0 + std::exp(-x[i]));
    return x;
}

template <class T>
static inline V<float> sigmoid(V<float> x) {
    const V<float> denominator = 1.0f + exponential<rough<T>>(-x);
#ifdef __AVX512F__
    // An approximation (2^-14) and one step of Newton cost a third of a division.
    const V<float> guess = (V<float>)_mm512_rcp14_ps((__m512)denominator);
    if constexpr (rough<T>) return guess;
    return guess * (2.0f - denominator * guess);
#else
    return 1.0f / denominator;
#endif
}

// Highest degree (and order) for which code can be made.
static constexpr int64_t max_degree = 8;

// Where the block of every degree starts among the Wigner-D entries of an edge.
struct BlockStarts {
    int64_t of[max_degree + 2];
    BlockStarts(int64_t lmax, int64_t mmax) {
        of[0] = 0;
        for (int64_t l = 0; l <= lmax; ++l)
            of[l + 1] = of[l] + (2 * (l < mmax ? l : mmax) + 1) * (2 * l + 1);
    }
};

template <int order, class F>
static inline void run_order(F& f) {
    if constexpr (LOWEST_ORDER <= order && order <= HIGHEST_ORDER) f.template run<2 * order + 1>();
}

// Calls `f.template run<rows>()` for the odd number of rows 2 min(l, mmax) + 1; the order is in the library's range.
template <class F>
static inline void with_rows(int64_t order, F&& f) {
    switch (order) {
        case 0: run_order<0>(f); break;
        case 1: run_order<1>(f); break;
        case 2: run_order<2>(f); break;
        case 3: run_order<3>(f); break;
        case 4: run_order<4>(f); break;
        case 5: run_order<5>(f); break;
        case 6: run_order<6>(f); break;
        case 7: run_order<7>(f); break;
        case 8: run_order<8>(f); break;
    }
}
