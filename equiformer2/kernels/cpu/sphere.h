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
    int64_t pairs = 0;
};

// From which longitude on they stand in pairs of opposite sign. There the factors of every second order from the third
// on (m < 0: sines) change their sign, the others (cosines) do not: both sums over orders are made of two halves.
template <class A>
static int64_t first_pair(const A* longitude, int64_t longitudes, int64_t orders) {
    int64_t first = longitudes;
    for (; first >= 2; first -= 2) {
        const A *one = longitude + (first - 2) * orders, *other = one + orders;
        for (int64_t i = 0; i < orders; ++i)
            if (other[i] != (i && i % 2 == 0 ? -one[i] : one[i])) return first;
    }
    return first;
}

// Sums over orders at a longitude and at its opposite.
template <int orders, class A>
static inline void at_pair(const A* at, const V<A>* q, V<A>& one, V<A>& other) {
    V<A> cosines = at[0] * q[0], sines = {};
    for (int i = 1; i < orders; i += 2) {
        cosines += at[i] * q[i];
        sines += at[i + 1] * q[i + 1];
    }
    one = cosines + sines;
    other = cosines - sines;
}

// Adds values at a longitude and at its opposite to the sums of all orders.
template <int orders, class A>
static inline void add_pair(const A* at, V<A> one, V<A> other, V<A>* z) {
    const V<A> total = one + other, difference = one - other;
    z[0] += at[0] * total;
    for (int i = 1; i < orders; i += 2) {
        z[i] += at[i] * total;
        z[i + 1] += at[i + 1] * difference;
    }
}

template <class A, class T>
struct SphereActivation {
    const Grid<A>& grid;
    const T *x, *gates, *grad_out;
    T *out, *grad_gates;
    int64_t channels;
    bool backward;

    // SiLU, or its derivative there times `slope`.
    V<A> activated(V<A> value, V<A> slope) const {
        const V<A> s = sigmoid<T>(value);
        return backward ? slope * s * (A(1) + value * (A(1) - s)) : value * s;
    }

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
                    const V<A> gate = load<A>(gates + c, count), s = sigmoid<T>(gate);
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
                int64_t a = 0;
                for (; a < grid.pairs; ++a) {
                    const A* at = grid.longitude + a * orders;
                    V<A> value = {}, slope = {};
                    for (int i = 0; i < orders; ++i) value += at[i] * q[i];
                    if (backward)
                        for (int i = 0; i < orders; ++i) slope += at[i] * p[i];
                    value = activated(value, slope);
                    for (int i = 0; i < orders; ++i) z[i] += at[i] * value;
                }
                for (; a < grid.longitudes; a += 2) {
                    const A* at = grid.longitude + a * orders;
                    V<A> one, other, slope = {}, other_slope = {};
                    at_pair<orders>(at, q, one, other);
                    if (backward) at_pair<orders>(at, p, slope, other_slope);
                    add_pair<orders>(at, activated(one, slope), activated(other, other_slope), z);
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
                    store(out + c, gate * sigmoid<T>(gate), count);
                }
                for (int64_t r = first; r < grid.rows_out; ++r) store(out + r * channels + c, sum[r], count);
            }
        }
    }
};

// `x` and `gates` may be columns of a wider tensor; without gates the scalars are activated like the rest.
// With `grad_out` the derivative: `out` is that of `x` and has its stride.
template <class A, class T>
static void sphere_activation(Grid<A> grid, const T* x, const T* gates, int64_t stride, const T* grad_out,
                              T* out, int64_t out_stride, T* grad_gates, int64_t count, int64_t channels,
                              int64_t mmax, int threads) {
    grid.pairs = first_pair(grid.longitude, grid.longitudes, 2 * mmax + 1);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
        with_rows(mmax, SphereActivation<A, T>{grid, x + i * stride, gates ? gates + i * stride : nullptr,
                                               grad_out ? grad_out + i * grid.rows_out * channels : nullptr,
                                               out + i * out_stride,
                                               grad_gates ? grad_gates + i * out_stride : nullptr, channels,
                                               grad_out != nullptr});
}

// How many pairs of points are worked on at a time.
static constexpr int together = 4;

// One direction of a transformation whose coefficients are anywhere: the i-th of `latitude`'s columns is row row_of[i].
template <class A>
struct HalfGrid {
    const A *latitude, *longitude;
    const int64_t *row_starts, *row_of;
    int64_t latitudes, longitudes, rows;
    int64_t pairs = 0;
};

// What is done to the values of points, or before they are summed: SiLU, or with `inputs` times its slope there.
template <class A, class T>
static inline V<A> changed(V<A> value, const T* inputs, bool activate, int64_t at, int64_t count) {
    if (inputs) {
        const V<A> x = load<A>(inputs + at, count), s = sigmoid<T>(x);
        return value * s * (A(1) + x * (A(1) - s));
    }
    return activate ? value * sigmoid<T>(value) : value;
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
                int64_t a = 0;
                for (; a < grid.pairs; ++a) {
                    V<A> value = {};
                    for (int i = 0; i < orders; ++i) value += grid.longitude[a * orders + i] * q[i];
                    put(value, a, b, c);
                }
                // Sums over orders are chains of dependent operations: several points at a time hide their latency.
                for (; a + 2 * together <= grid.longitudes; a += 2 * together) pairs<together, orders>(q, a, b, c);
                for (; a < grid.longitudes; a += 2) pairs<1, orders>(q, a, b, c);
            }
        }
    }

    template <int n, int orders>
    void pairs(const V<A>* q, int64_t a, int64_t b, int64_t c) {
        const A* longitude = grid.longitude + a * orders;
        V<A> cosines[n], sines[n] = {};
        for (int j = 0; j < n; ++j) cosines[j] = longitude[2 * j * orders] * q[0];
        for (int i = 1; i < orders; i += 2)
            for (int j = 0; j < n; ++j) {
                cosines[j] += longitude[2 * j * orders + i] * q[i];
                sines[j] += longitude[2 * j * orders + i + 1] * q[i + 1];
            }
        for (int j = 0; j < n; ++j) {
            put(cosines[j] + sines[j], a + 2 * j, b, c);
            put(cosines[j] - sines[j], a + 2 * j + 1, b, c);
        }
    }

    void put(V<A> value, int64_t a, int64_t b, int64_t c) {
        const int64_t at = (b * grid.longitudes + a) * channels + c;
        store(out + at, changed<A, T>(value, inputs, activate, at, channels - c), channels - c);
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
                int64_t a = 0;
                for (; a < grid.pairs; ++a) {
                    const V<A> value = get(a, b, c);
                    for (int i = 0; i < orders; ++i) z[i] += grid.longitude[a * orders + i] * value;
                }
                for (; a < grid.longitudes; a += 2)
                    add_pair<orders>(grid.longitude + a * orders, get(a, b, c), get(a + 1, b, c), z);
                for (int i = 0; i < orders; ++i)
                    for (int64_t r = starts[i]; r < starts[i + 1]; ++r) sum[r] += latitude[r] * z[i];
            }
            for (int64_t r = 0; r < grid.rows; ++r) store(out + grid.row_of[r] * channels + c, sum[r], count);
        }
    }

    V<A> get(int64_t a, int64_t b, int64_t c) const {
        const int64_t at = (b * grid.longitudes + a) * channels + c, count = channels - c;
        return changed<A, T>(load<A>(points + at, count), inputs, activate, at, count);
    }
};

// `x [count, rows, channels]` to `out [count, latitudes, longitudes, channels]`; `inputs` like `out`.
template <class A, class T>
static void to_points(HalfGrid<A> grid, const T* x, const T* inputs, bool activate, T* out, int64_t count,
                      int64_t channels, int64_t mmax, int threads) {
    const int64_t points = grid.latitudes * grid.longitudes * channels, rows = grid.rows * channels;
    grid.pairs = first_pair(grid.longitude, grid.longitudes, 2 * mmax + 1);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
        with_rows(mmax, ToPoints<A, T>{grid, x + i * rows, inputs ? inputs + i * points : nullptr, out + i * points,
                                       channels, activate});
}

// The other way; `inputs` like `points`.
template <class A, class T>
static void from_points(HalfGrid<A> grid, const T* points, const T* inputs, bool activate, T* out, int64_t count,
                        int64_t channels, int64_t mmax, int threads) {
    const int64_t wide = grid.latitudes * grid.longitudes * channels, rows = grid.rows * channels;
    grid.pairs = first_pair(grid.longitude, grid.longitudes, 2 * mmax + 1);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i)
        with_rows(mmax, FromPoints<A, T>{grid, points + i * wide, inputs ? inputs + i * wide : nullptr, out + i * rows,
                                         channels, activate});
}
