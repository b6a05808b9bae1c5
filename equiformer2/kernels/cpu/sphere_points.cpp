// The two halves of a transformation on the sphere grid, for networks that do something between them.

#include "sphere.h"

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

extern "C" void to_points(const ARITHMETIC* latitude, const ARITHMETIC* longitude, const int64_t* row_starts,
                          const int64_t* row_of, int64_t latitudes, int64_t longitudes, int64_t rows,
                          const OPERAND* x, const OPERAND* inputs, int64_t activate, OPERAND* out, int64_t count,
                          int64_t channels, int64_t mmax, int64_t threads) {
    to_points<ARITHMETIC, OPERAND>(
        HalfGrid<ARITHMETIC>{latitude, longitude, row_starts, row_of, latitudes, longitudes, rows}, x, inputs,
        activate, out, count, channels, mmax, threads);
}

extern "C" void from_points(const ARITHMETIC* latitude, const ARITHMETIC* longitude, const int64_t* row_starts,
                            const int64_t* row_of, int64_t latitudes, int64_t longitudes, int64_t rows,
                            const OPERAND* points, const OPERAND* inputs, int64_t activate, OPERAND* out,
                            int64_t count, int64_t channels, int64_t mmax, int64_t threads) {
    from_points<ARITHMETIC, OPERAND>(
        HalfGrid<ARITHMETIC>{latitude, longitude, row_starts, row_of, latitudes, longitudes, rows}, points, inputs,
        activate, out, count, channels, mmax, threads);
}
