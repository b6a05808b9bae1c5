// The separable S2 activation at once: to the points of the grid, SiLU, and back.

#include "sphere.h"

// A grid is latitudes times longitudes: coefficient (l, m) at a point is a function of the latitude times one of
// (m, longitude). Rows of equal m stand together: those of the i-th order are row_starts[i] … row_starts[i + 1].
template <class A>
struct Grid {
    const A *to_latitude, *from_latitude, *longitude;
    const int64_t* row_starts;
    int64_t latitudes, longitudes, rows, rows_out;
    int64_t pairs = 0;
};

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

extern "C" void sphere_activation(const ARITHMETIC* to_latitude, const ARITHMETIC* from_latitude,
                                  const ARITHMETIC* longitude, const int64_t* row_starts, int64_t latitudes,
                                  int64_t longitudes, int64_t rows, int64_t rows_out, const OPERAND* x,
                                  const OPERAND* gates, int64_t stride, const OPERAND* grad_out, OPERAND* out,
                                  int64_t out_stride, OPERAND* grad_gates, int64_t count, int64_t channels,
                                  int64_t mmax, int64_t threads) {
    sphere_activation<ARITHMETIC, OPERAND>(
        Grid<ARITHMETIC>{to_latitude, from_latitude, longitude, row_starts, latitudes, longitudes, rows, rows_out}, x,
        gates, stride, grad_out, out, out_stride, grad_gates, count, channels, mmax, threads);
}
