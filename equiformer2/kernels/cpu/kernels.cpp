// Memory-bound halves of a message: what stands before, between and behind the GEMMs of an SO(2) convolution.
//
// Layouts. `packed [E, P]`: Wigner-D entries, block after block, rows m = 0, +1, -1, +2, … (kernels/rotation.py).
// Inputs and products of the GEMMs: one `[E, n]` for m = 0, then three for every m > 0 (kernels/so2.py), n counting
// (degree l >= m, channel). A is the type of arithmetic, T that in which GEMM operands are stored.
// Every output element is written by one thread in a fixed sequence: results do not depend on the threads.

#include <algorithm>
#include <vector>

#include "common.h"
#include "sphere.h"

static inline int64_t order_of_degree(int64_t l, int64_t mmax) { return l < mmax ? l : mmax; }

// The GEMM operands of order m among those of all orders.
template <class P>
static inline P of_order(P operands, int m) { return m == 0 ? operands : operands + 3 * m - 2; }

// Column of the radial weights of (m, l), in units of 2C.
static inline int64_t radial_column(int64_t m, int64_t l, int64_t lmax, bool shared) {
    return shared ? l : m * (lmax + 1) - m * (m - 1) / 2 + l - m;
}

template <class A, class T>
struct GatherRotate {
    const A *x, *blocks;
    const T *radial, *bias;
    T* const* out;
    int64_t e, channels, column0, l, lmax;
    bool shared;

    template <int rows>
    void run() {
        const int64_t n = 2 * l + 1, wide = 2 * channels;
        for (int64_t c = 0; c < channels; c += Vector<A>::width) {
            const int64_t count = channels - c;
            V<A> y[rows] = {};
            for (int64_t k = 0; k < n; ++k) {
                const V<A> v = load<A>(x + (l * l + k) * channels + c, count);
                for (int r = 0; r < rows; ++r) y[r] += blocks[r * n + k] * v;
            }
            for (int m = 0; 2 * m < rows; ++m) {
                const int64_t column = radial_column(m, l, lmax, shared) * wide + column0 + c;
                const V<A> weight = load<A>(radial + column, count) + load<A>(bias + column, count);
                const int64_t width = (lmax + 1 - m) * wide;
                const int64_t at = e * width + (l - m) * wide + column0 + c;
                T* const* to = of_order(out, m);
                if (m == 0) {
                    store(to[0] + at, y[0] * weight, count);
                } else {
                    const V<A> plus = y[m > 0 ? 2 * m - 1 : 0] * weight, minus = y[2 * m] * weight;
                    store(to[0] + at, plus + minus, count);
                    store(to[1] + at, plus, count);
                    store(to[2] + at, minus, count);
                }
            }
        }
    }
};

template <class A, class T>
static void gather_rotate(const A* x, const A* x_target, const int64_t* source, const int64_t* target,
                          const A* packed, int64_t packed_width, const T* radial, const T* bias,
                          int64_t radial_width, T* const* out, int64_t edges, int64_t channels, int64_t lmax,
                          int64_t mmax, bool shared, int threads) {
    const BlockStarts starts(lmax, mmax);
    const int64_t row = (lmax + 1) * (lmax + 1) * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t e = 0; e < edges; ++e)
        for (int side = 0; side < 2; ++side)
            for (int64_t l = 0; l <= lmax; ++l)
                with_rows(order_of_degree(l, mmax),
                          GatherRotate<A, T>{side ? x_target + target[e] * row : x + source[e] * row,
                                             packed + e * packed_width + starts.of[l], radial + e * radial_width,
                                             bias, out, e, channels, side * channels, l, lmax, shared});
}

template <class A, class T>
struct GatherRotateBackward {
    const A *x, *blocks;
    A* grad_x;
    const T *radial, *bias;
    T* grad_radial;
    const T* const* grad;
    int64_t e, channels, first, last, column0, l, lmax;
    bool shared;

    template <int rows>
    void run() {
        const int64_t n = 2 * l + 1, wide = 2 * channels;
        for (int64_t c = first; c < last; c += Vector<A>::width) {
            const int64_t count = channels - c;
            V<A> y[rows] = {};
            for (int64_t k = 0; k < n; ++k) {
                const V<A> v = load<A>(x + (l * l + k) * channels + c, count);
                for (int r = 0; r < rows; ++r) y[r] += blocks[r * n + k] * v;
            }
            V<A> total = {};
            for (int m = 0; 2 * m < rows; ++m) {
                const int64_t column = radial_column(m, l, lmax, shared) * wide + column0 + c;
                const V<A> weight = load<A>(radial + column, count) + load<A>(bias + column, count);
                const int64_t width = (lmax + 1 - m) * wide;
                const int64_t at = e * width + (l - m) * wide + column0 + c;
                const T* const* from = of_order(grad, m);
                V<A> grad_weight;
                if (m == 0) {
                    const V<A> g = load<A>(from[0] + at, count);
                    grad_weight = g * y[0];
                    y[0] = g * weight;
                } else {
                    const V<A> common = load<A>(from[0] + at, count);
                    const V<A> plus = common + load<A>(from[1] + at, count);
                    const V<A> minus = common + load<A>(from[2] + at, count);
                    V<A>& y_plus = y[m > 0 ? 2 * m - 1 : 0];
                    grad_weight = plus * y_plus + minus * y[2 * m];
                    y_plus = plus * weight;
                    y[2 * m] = minus * weight;
                }
                total += grad_weight;
                if (!shared) store(grad_radial + column, grad_weight, count);
            }
            if (shared) store(grad_radial + l * wide + column0 + c, total, count);
            for (int64_t k = 0; k < n; ++k) {
                A* to = grad_x + (l * l + k) * channels + c;
                V<A> sum = load<A>(to, count);
                for (int r = 0; r < rows; ++r) sum += blocks[r * n + k] * y[r];
                store(to, sum, count);
            }
        }
    }
};

// Threads share the channels, not the edges: sums over the edges of an atom then need no synchronisation.
template <class A, class T>
static void gather_rotate_backward(const A* x, const A* x_target, const int64_t* source, const int64_t* target,
                                   const A* packed, int64_t packed_width, const T* radial, const T* bias,
                                   int64_t radial_width, const T* const* grad, A* grad_x, A* grad_x_target,
                                   T* grad_radial, int64_t edges, int64_t channels, int64_t lmax, int64_t mmax,
                                   bool shared, int threads) {
    const BlockStarts starts(lmax, mmax);
    const int64_t row = (lmax + 1) * (lmax + 1) * channels, width = Vector<A>::width;
    const int64_t vectors = (channels + width - 1) / width;
    // If gradients of sources and targets go to one tensor, both sides of a channel belong to one thread.
    const bool same = grad_x == grad_x_target;
    const int64_t shares = std::min<int64_t>(vectors, std::max<int64_t>(1, same ? threads : (threads + 1) / 2));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t share = 0; share < (same ? 1 : 2) * shares; ++share) {
        const int64_t part = share % shares;
        const int64_t first = vectors * part / shares * width;
        const int64_t last = std::min(channels, vectors * (part + 1) / shares * width);
        for (int64_t e = 0; e < edges; ++e)
            for (int side = 0; side < 2; ++side) {
                if (!same && side != share / shares) continue;
                for (int64_t l = 0; l <= lmax; ++l) {
                    const int64_t atom = (side ? target : source)[e];
                    with_rows(order_of_degree(l, mmax),
                              GatherRotateBackward<A, T>{
                                  (side ? x_target : x) + atom * row, packed + e * packed_width + starts.of[l],
                                  (side ? grad_x_target : grad_x) + atom * row, radial + e * radial_width, bias,
                                  grad_radial + e * radial_width, grad, e, channels, first, last,
                                  side * channels, l, lmax, shared});
                }
            }
    }
}

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

#define EXPORT(suffix, A, T)                                                                                        \
    extern "C" void gather_rotate_##suffix(const A* x, const A* xt, const int64_t* s, const int64_t* t, const A* d, \
                                           int64_t dw, const T* radial, const T* bias, int64_t rw, T* const* out,   \
                                           int64_t e, int64_t c, int64_t l, int64_t m, int64_t shared, int64_t threads) {   \
        gather_rotate<A, T>(x, xt, s, t, d, dw, radial, bias, rw, out, e, c, l, m, shared, threads);                \
    }                                                                                                               \
    extern "C" void gather_rotate_backward_##suffix(                                                                \
        const A* x, const A* xt, const int64_t* s, const int64_t* t, const A* d, int64_t dw, const T* radial,       \
        const T* bias, int64_t rw, const T* const* grad, A* gx, A* gxt, T* gr, int64_t e, int64_t c, int64_t l,     \
        int64_t m, int64_t shared, int64_t threads) {                                                                       \
        gather_rotate_backward<A, T>(x, xt, s, t, d, dw, radial, bias, rw, grad, gx, gxt, gr, e, c, l, m, shared,   \
                                     threads);                                                                      \
    }                                                                                                               \
    extern "C" void rotate_sum_##suffix(const T* const* v, const T* bias, const A* alpha, int64_t heads,            \
                                        const A* d, int64_t dw, const int64_t* t, A* out, int64_t e, int64_t c,     \
                                        int64_t l, int64_t m, int64_t kl, int64_t km, int64_t threads) {                \
        rotate_sum<A, T>(v, bias, alpha, heads, d, dw, t, out, e, c, l, m, kl, km, threads);                        \
    }                                                                                                               \
    extern "C" void rotate_sum_backward_##suffix(const A* grad, const T* v, int64_t vw, const A* alpha,             \
                                                 int64_t heads, const A* d, int64_t dw, const int64_t* t,           \
                                                 T* const* gv, A* ga, int64_t e, int64_t c, int64_t l, int64_t m,   \
                                                 int64_t kl, int64_t km, int64_t threads) {                             \
        rotate_sum_backward<A, T>(grad, v, vw, alpha, heads, d, dw, t, gv, ga, e, c, l, m, kl, km, threads);      \
    }                                                                                                               \
    extern "C" void sphere_activation_##suffix(                                                                     \
        const A* tl, const A* fl, const A* lon, const int64_t* starts, int64_t nlat, int64_t nlon, int64_t rows,    \
        int64_t rows_out, const T* x, const T* gates, int64_t stride, const T* grad, T* out, int64_t out_stride,    \
        T* grad_gates, int64_t n, int64_t c, int64_t m, int64_t threads) {                                              \
        sphere_activation<A, T>(Grid<A>{tl, fl, lon, starts, nlat, nlon, rows, rows_out}, x, gates, stride, grad,   \
                                out, out_stride, grad_gates, n, c, m, threads);                                     \
    }                                                                                                               \
    extern "C" void to_points_##suffix(const A* lat, const A* lon, const int64_t* starts, const int64_t* row_of,    \
                                       int64_t nlat, int64_t nlon, int64_t rows, const T* x, const T* inputs,       \
                                       int64_t activate, T* out, int64_t n, int64_t c, int64_t m, int64_t threads) {    \
        to_points<A, T>(HalfGrid<A>{lat, lon, starts, row_of, nlat, nlon, rows}, x, inputs, activate, out, n, c, m, \
                        threads);                                                                                   \
    }                                                                                                               \
    extern "C" void from_points_##suffix(const A* lat, const A* lon, const int64_t* starts, const int64_t* row_of,  \
                                         int64_t nlat, int64_t nlon, int64_t rows, const T* points, const T* inputs,\
                                         int64_t activate, T* out, int64_t n, int64_t c, int64_t m, int64_t threads) {  \
        from_points<A, T>(HalfGrid<A>{lat, lon, starts, row_of, nlat, nlon, rows}, points, inputs, activate, out, n, \
                          c, m, threads);                                                                           \
    }

EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, float, bf16)
