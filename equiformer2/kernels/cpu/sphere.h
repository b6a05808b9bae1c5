// The sphere grid: S2 activation at once, and the two halves of a transformation with something between them.
#pragma once

#include <algorithm>

#include "common.h"

static constexpr int64_t most_rows = (max_degree + 1) * (max_degree + 1);

// A grid is latitudes times longitudes: coefficient (l, m) at a point is a function of the latitude times one of
// (m, longitude). Rows of equal m stand together: those of the i-th order are row_starts[i] … row_starts[i + 1].
template <class A>
struct Grid {
    const A *to_latitude, *from_latitude, *longitude;
    const int64_t* row_starts;
    int64_t latitudes, longitudes, rows, rows_out;
};

template <class A, class T>
struct SphereActivation {
    const Grid<A>& grid;
    const T *x, *gates, *grad_out;
    T *out, *grad_gates;
    int64_t channels;
    bool backward;

    template <int orders>
    void run() {
        const int64_t* starts = grid.row_starts;
        const int64_t first = gates ? 1 : 0;
        for (int64_t c = 0; c < channels; c += Vector<A>::width) {
            const int64_t count = channels - c;
            V<A> in[most_rows], grad[most_rows], sum[most_rows];
            for (int64_t r = 0; r < grid.rows; ++r) in[r] = load<A>(x + r * channels + c, count);
            for (int64_t r = 0; r < (backward ? grid.rows : grid.rows_out); ++r) sum[r] = V<A>{};
            if (backward) {
                for (int64_t r = 0; r < grid.rows_out; ++r) grad[r] = load<A>(grad_out + r * channels + c, count);
                if (gates) {
                    const V<A> gate = load<A>(gates + c, count), s = sigmoid(gate);
                    store(grad_gates + c, grad[0] * s * (A(1) + gate * (A(1) - s)), count);
                    grad[0] = V<A>{};
                }
            }
            for (int64_t b = 0; b < grid.latitudes; ++b) {
                const A *to = grid.to_latitude + b * grid.rows, *from = grid.from_latitude + b * grid.rows;
                V<A> q[orders], p[orders], z[orders];
                for (int i = 0; i < orders; ++i) {
                    q[i] = p[i] = z[i] = V<A>{};
                    for (int64_t r = starts[i]; r < starts[i + 1]; ++r) q[i] += to[r] * in[r];
                    if (backward)
                        for (int64_t r = starts[i]; r < std::min(starts[i + 1], grid.rows_out); ++r)
                            p[i] += from[r] * grad[r];
                }
                for (int64_t a = 0; a < grid.longitudes; ++a) {
                    const A* at = grid.longitude + a * orders;
                    V<A> value = {}, slope = {};
                    for (int i = 0; i < orders; ++i) value += at[i] * q[i];
                    const V<A> s = sigmoid(value);
                    if (backward) {
                        for (int i = 0; i < orders; ++i) slope += at[i] * p[i];
                        value = slope * s * (A(1) + value * (A(1) - s));
                    } else {
                        value *= s;
                    }
                    for (int i = 0; i < orders; ++i) z[i] += at[i] * value;
                }
                for (int i = 0; i < orders; ++i) {
                    if (backward)
                        for (int64_t r = starts[i]; r < starts[i + 1]; ++r) sum[r] += to[r] * z[i];
                    else
                        for (int64_t r = starts[i]; r < std::min(starts[i + 1], grid.rows_out); ++r)
                            sum[r] += from[r] * z[i];
                }
            }
            if (backward) {
                for (int64_t r = 0; r < grid.rows; ++r) store(out + r * channels + c, sum[r], count);
            } else {
                if (gates) {
                    const V<A> gate = load<A>(gates + c, count);
                    store(out + c, gate * sigmoid(gate), count);
                }
                for (int64_t r = first; r < grid.rows_out; ++r) store(out + r * channels + c, sum[r], count);
            }
        }
    }
};

// `x` and `gates` may be columns of a wider tensor; without gates the scalars are activated like the rest.
// With `grad_out` the derivative: `out` is that of `x` and has its stride.
template <class A, class T>
static void sphere_activation(const Grid<A>& grid, const T* x, const T* gates, int64_t stride, const T* grad_out,
                              T* out, int64_t out_stride, T* grad_gates, int64_t count, int64_t channels,
                              int64_t mmax, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
        with_rows(mmax, SphereActivation<A, T>{grid, x + i * stride, gates ? gates + i * stride : nullptr,
                                               grad_out ? grad_out + i * grid.rows_out * channels : nullptr,
                                               out + i * out_stride,
                                               grad_gates ? grad_gates + i * out_stride : nullptr, channels,
                                               grad_out != nullptr});
}

// How many points are worked on at a time.
static constexpr int together = 6;

// One direction of a transformation whose coefficients are anywhere: the i-th of `latitude`'s columns is row row_of[i].
template <class A>
struct HalfGrid {
    const A *latitude, *longitude;
    const int64_t *row_starts, *row_of;
    int64_t latitudes, longitudes, rows;
};

// What is done to the values of points, or before they are summed: SiLU, or with `inputs` times its slope there.
template <class A, class T>
static inline V<A> changed(V<A> value, const T* inputs, bool activate, int64_t at, int64_t count) {
    if (inputs) {
        const V<A> x = load<A>(inputs + at, count), s = sigmoid(x);
        return value * s * (A(1) + x * (A(1) - s));
    }
    return activate ? value * sigmoid(value) : value;
}

template <class A, class T>
struct ToPoints {
    const HalfGrid<A>& grid;
    const T *x, *inputs;
    T* out;
    int64_t channels;
    bool activate;

    template <int orders>
    void run() {
        const int64_t* starts = grid.row_starts;
        for (int64_t c = 0; c < channels; c += Vector<A>::width) {
            const int64_t count = channels - c;
            V<A> in[most_rows];
            for (int64_t r = 0; r < grid.rows; ++r) in[r] = load<A>(x + grid.row_of[r] * channels + c, count);
            for (int64_t b = 0; b < grid.latitudes; ++b) {
                const A* latitude = grid.latitude + b * grid.rows;
                V<A> q[orders] = {};
                for (int i = 0; i < orders; ++i)
                    for (int64_t r = starts[i]; r < starts[i + 1]; ++r) q[i] += latitude[r] * in[r];
                // Sums over orders are chains of dependent operations: several points at a time hide their latency.
                int64_t a = 0;
                for (; a + together <= grid.longitudes; a += together) points<together, orders>(q, a, b, c);
                for (; a < grid.longitudes; ++a) points<1, orders>(q, a, b, c);
            }
        }
    }

    template <int n, int orders>
    void points(const V<A>* q, int64_t a, int64_t b, int64_t c) {
        const A* longitude = grid.longitude + a * orders;
        V<A> value[n] = {};
        for (int i = 0; i < orders; ++i)
            for (int j = 0; j < n; ++j) value[j] += longitude[j * orders + i] * q[i];
        for (int j = 0; j < n; ++j) {
            const int64_t at = (b * grid.longitudes + a + j) * channels + c;
            store(out + at, changed<A, T>(value[j], inputs, activate, at, channels - c), channels - c);
        }
    }
};

template <class A, class T>
struct FromPoints {
    const HalfGrid<A>& grid;
    const T *points, *inputs;
    T* out;
    int64_t channels;
    bool activate;

    template <int orders>
    void run() {
        const int64_t* starts = grid.row_starts;
        for (int64_t c = 0; c < channels; c += Vector<A>::width) {
            const int64_t count = channels - c;
            V<A> sum[most_rows];
            for (int64_t r = 0; r < grid.rows; ++r) sum[r] = V<A>{};
            for (int64_t b = 0; b < grid.latitudes; ++b) {
                const A* latitude = grid.latitude + b * grid.rows;
                V<A> z[orders] = {};
                for (int64_t a = 0; a < grid.longitudes; ++a) {
                    const int64_t at = (b * grid.longitudes + a) * channels + c;
                    const V<A> value = changed<A, T>(load<A>(points + at, count), inputs, activate, at, count);
                    for (int i = 0; i < orders; ++i) z[i] += grid.longitude[a * orders + i] * value;
                }
                for (int i = 0; i < orders; ++i)
                    for (int64_t r = starts[i]; r < starts[i + 1]; ++r) sum[r] += latitude[r] * z[i];
            }
            for (int64_t r = 0; r < grid.rows; ++r) store(out + grid.row_of[r] * channels + c, sum[r], count);
        }
    }
};

// `x [count, rows, channels]` to `out [count, latitudes, longitudes, channels]`; `inputs` like `out`.
template <class A, class T>
static void to_points(const HalfGrid<A>& grid, const T* x, const T* inputs, bool activate, T* out, int64_t count,
                      int64_t channels, int64_t mmax, int threads) {
    const int64_t points = grid.latitudes * grid.longitudes * channels, rows = grid.rows * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
        with_rows(mmax, ToPoints<A, T>{grid, x + i * rows, inputs ? inputs + i * points : nullptr, out + i * points,
                                       channels, activate});
}

// The other way; `inputs` like `points`.
template <class A, class T>
static void from_points(const HalfGrid<A>& grid, const T* points, const T* inputs, bool activate, T* out, int64_t count,
                        int64_t channels, int64_t mmax, int threads) {
    const int64_t wide = grid.latitudes * grid.longitudes * channels, rows = grid.rows * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
        with_rows(mmax, FromPoints<A, T>{grid, points + i * wide, inputs ? inputs + i * wide : nullptr, out + i * rows,
                                         channels, activate});
}
