// Memory-bound halves of a message: what stands before, between and behind the GEMMs of an SO(2) convolution.
//
// Layouts. `packed [E, P]`: Wigner-D entries, block after block, rows m = 0, +1, -1, +2, … (kernels/rotation.py).
// Inputs and products of the GEMMs: one `[E, n]` for m = 0, then three for every m > 0 (kernels/so2.py), n counting
// (degree l >= m, channel). A is the type of arithmetic, T that in which GEMM operands are stored.
// Every output element is written by one thread in a fixed sequence: results do not depend on the threads.

#pragma once

#include "common.h"

static inline int64_t order_of_degree(int64_t l, int64_t mmax) { return l < mmax ? l : mmax; }

// The GEMM operands of order m among those of all orders.
template <class P>
static inline P of_order(P operands, int m) { return m == 0 ? operands : operands + 3 * m - 2; }

// Column of the radial weights of (m, l), in units of 2C.
static inline int64_t radial_column(int64_t m, int64_t l, int64_t lmax, bool shared) {
    return shared ? l : m * (lmax + 1) - m * (m - 1) / 2 + l - m;
}
