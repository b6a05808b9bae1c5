// Inputs of the GEMMs: both atoms of an edge gathered, rotated and multiplied by the radial weights.

#include <algorithm>

#include "edges.h"

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

extern "C" void gather_rotate(const ARITHMETIC* x, const ARITHMETIC* x_target, const int64_t* source,
                              const int64_t* target, const ARITHMETIC* packed, int64_t packed_width,
                              const OPERAND* radial, const OPERAND* bias, int64_t radial_width, OPERAND* const* out,
                              int64_t edges, int64_t channels, int64_t lmax, int64_t mmax, int64_t shared,
                              int64_t threads) {
    gather_rotate<ARITHMETIC, OPERAND>(x, x_target, source, target, packed, packed_width, radial, bias, radial_width,
                                       out, edges, channels, lmax, mmax, shared, threads);
}

extern "C" void gather_rotate_backward(const ARITHMETIC* x, const ARITHMETIC* x_target, const int64_t* source,
                                       const int64_t* target, const ARITHMETIC* packed, int64_t packed_width,
                                       const OPERAND* radial, const OPERAND* bias, int64_t radial_width,
                                       const OPERAND* const* grad, ARITHMETIC* grad_x, ARITHMETIC* grad_x_target,
                                       OPERAND* grad_radial, int64_t edges, int64_t channels, int64_t lmax,
                                       int64_t mmax, int64_t shared, int64_t threads) {
    gather_rotate_backward<ARITHMETIC, OPERAND>(x, x_target, source, target, packed, packed_width, radial, bias,
                                                radial_width, grad, grad_x, grad_x_target, grad_radial, edges,
                                                channels, lmax, mmax, shared, threads);
}
