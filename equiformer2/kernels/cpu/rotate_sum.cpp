// Messages: products of the GEMMs combined, weighted by attention, rotated back and added to their targets.

#include <algorithm>
#include <vector>

#include "edges.h"

// First edge of a thread's share: edges of one target stay together.
static inline int64_t share_start(const int64_t* target, int64_t edges, int thread, int threads) {
    int64_t e = edges * thread / threads;
    while (e > 0 && e < edges && target[e] == target[e - 1]) ++e;
    return e;
}

template <class A, class T>
struct RotateSum {
    const T* const* values;
    const T* bias;
    const A *alpha, *blocks;
    A* out;
    int64_t e, channels, l, lmax;

    template <int rows>
    void run() {
        const int64_t n = 2 * l + 1;
        for (int64_t c = 0; c < channels; c += Vector<A>::width) {
            const int64_t count = channels - c;
            V<A> v[rows];
            v[0] = load<A>(values[0] + (e * (lmax + 1) + l) * channels + c, count);
            if (bias) v[0] += load<A>(bias + l * channels + c, count);
            for (int m = 1; 2 * m < rows; ++m) {
                const int64_t at = (e * (lmax + 1 - m) + l - m) * channels + c;
                const T* const* from = of_order(values, m);
                const V<A> common = load<A>(from[0] + at, count);
                v[2 * m - 1] = common - load<A>(from[2] + at, count);
                v[2 * m] = common + load<A>(from[1] + at, count);
            }
            if (alpha) {
                const V<A> weight = load<A>(alpha + c, count);
                for (int r = 0; r < rows; ++r) v[r] *= weight;
            }
            for (int64_t k = 0; k < n; ++k) {
                A* to = out + (l * l + k) * channels + c;
                V<A> sum = load<A>(to, count);
                for (int r = 0; r < rows; ++r) sum += blocks[r * n + k] * v[r];
                store(to, sum, count);
            }
        }
    }
};

template <class A>
static void spread(const A* alpha, int64_t heads, int64_t channels, std::vector<A>& per_channel) {
    for (int64_t c = 0; c < channels; ++c) per_channel[c] = alpha[c / (channels / heads)];
}

// Targets are sorted; `lmax, mmax` are those of `packed`, `kept_*` those of the values.
template <class A, class T>
static void rotate_sum(const T* const* values, const T* bias, const A* alpha, int64_t heads, const A* packed,
                       int64_t packed_width, const int64_t* target, A* out, int64_t edges, int64_t channels,
                       int64_t lmax, int64_t mmax, int64_t kept_lmax, int64_t kept_mmax, int threads) {
    const BlockStarts starts(lmax, mmax);
    const int64_t row = (kept_lmax + 1) * (kept_lmax + 1) * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; ++thread) {
        std::vector<A> per_channel(channels);
        const int64_t stop = share_start(target, edges, thread + 1, threads);
        for (int64_t e = share_start(target, edges, thread, threads); e < stop; ++e) {
            if (alpha) spread(alpha + e * heads, heads, channels, per_channel);
            for (int64_t l = 0; l <= kept_lmax; ++l)
                with_rows(order_of_degree(l, kept_mmax),
                          RotateSum<A, T>{values, bias, alpha ? per_channel.data() : nullptr,
                                          packed + e * packed_width + starts.of[l], out + target[e] * row, e, channels,
                                          l, kept_lmax});
        }
    }
}

template <class A, class T>
struct RotateSumBackward {
    const A* grad;
    const T* values;
    const A *alpha, *blocks;
    T* const* grad_values;
    A* grad_alpha;
    int64_t e, channels, l, lmax;

    template <int rows>
    void run() {
        const int64_t n = 2 * l + 1;
        for (int64_t c = 0; c < channels; c += Vector<A>::width) {
            const int64_t count = channels - c;
            V<A> g[rows] = {};
            for (int64_t k = 0; k < n; ++k) {
                const V<A> v = load<A>(grad + (l * l + k) * channels + c, count);
                for (int r = 0; r < rows; ++r) g[r] += blocks[r * n + k] * v;
            }
            const int64_t row = (e * (lmax + 1) + l) * channels + c;
            V<A> weight = V<A>{} + A(1);
            if (alpha) {
                weight = load<A>(alpha + c, count);
                const T* value = values + l * channels + c;
                V<A> product = load<A>(value, count) * g[0];
                for (int m = 1; 2 * m < rows; ++m) {
                    // From row l of order m - 1 to row l of +m, and on to that of -m.
                    const int64_t degrees = lmax + 1 - m;
                    value += degrees * channels;
                    product += load<A>(value, count) * g[2 * m - 1];
                    value += degrees * channels;
                    product += load<A>(value, count) * g[2 * m];
                }
                store(grad_alpha + c, load<A>(grad_alpha + c, count) + product, count);
            }
            store(grad_values[0] + row, weight * g[0], count);
            for (int m = 1; 2 * m < rows; ++m) {
                const int64_t at = (e * (lmax + 1 - m) + l - m) * channels + c;
                T* const* to = of_order(grad_values, m);
                const V<A> plus = weight * g[2 * m - 1], minus = weight * g[2 * m];
                store(to[0] + at, plus + minus, count);
                store(to[1] + at, minus, count);
                store(to[2] + at, -plus, count);
            }
        }
    }
};

template <class A, class T>
static void rotate_sum_backward(const A* grad, const T* values, int64_t values_width, const A* alpha, int64_t heads,
                                const A* packed, int64_t packed_width, const int64_t* target,
                                T* const* grad_values, A* grad_alpha, int64_t edges, int64_t channels, int64_t lmax,
                                int64_t mmax, int64_t kept_lmax, int64_t kept_mmax, int threads) {
    const BlockStarts starts(lmax, mmax);
    const int64_t row = (kept_lmax + 1) * (kept_lmax + 1) * channels;
#pragma omp parallel num_threads(threads)
    {
        std::vector<A> per_channel(channels), grad_per_channel(channels);
#pragma omp for schedule(static)
        for (int64_t e = 0; e < edges; ++e) {
            if (alpha) {
                spread(alpha + e * heads, heads, channels, per_channel);
                std::fill(grad_per_channel.begin(), grad_per_channel.end(), A(0));
            }
            for (int64_t l = 0; l <= kept_lmax; ++l)
                with_rows(order_of_degree(l, kept_mmax),
                          RotateSumBackward<A, T>{grad + target[e] * row, values + e * values_width,
                                                  alpha ? per_channel.data() : nullptr,
                                                  packed + e * packed_width + starts.of[l], grad_values,
                                                  grad_per_channel.data(), e, channels, l, kept_lmax});
            if (alpha) {
                for (int64_t h = 0; h < heads; ++h) grad_alpha[e * heads + h] = A(0);
                for (int64_t c = 0; c < channels; ++c)
                    grad_alpha[e * heads + c / (channels / heads)] += grad_per_channel[c];
            }
        }
    }
}

extern "C" void rotate_sum(const OPERAND* const* values, const OPERAND* bias, const ARITHMETIC* alpha, int64_t heads,
                           const ARITHMETIC* packed, int64_t packed_width, const int64_t* target, ARITHMETIC* out,
                           int64_t edges, int64_t channels, int64_t lmax, int64_t mmax, int64_t kept_lmax,
                           int64_t kept_mmax, int64_t threads) {
    rotate_sum<ARITHMETIC, OPERAND>(values, bias, alpha, heads, packed, packed_width, target, out, edges, channels,
                                    lmax, mmax, kept_lmax, kept_mmax, threads);
}

extern "C" void rotate_sum_backward(const ARITHMETIC* grad, const OPERAND* values, int64_t values_width,
                                    const ARITHMETIC* alpha, int64_t heads, const ARITHMETIC* packed,
                                    int64_t packed_width, const int64_t* target, OPERAND* const* grad_values,
                                    ARITHMETIC* grad_alpha, int64_t edges, int64_t channels, int64_t lmax,
                                    int64_t mmax, int64_t kept_lmax, int64_t kept_mmax, int64_t threads) {
    rotate_sum_backward<ARITHMETIC, OPERAND>(grad, values, values_width, alpha, heads, packed, packed_width, target,
                                             grad_values, grad_alpha, edges, channels, lmax, mmax, kept_lmax,
                                             kept_mmax, threads);
}
