// The sphere grid: a coefficient (l, m) at a point is a function of the latitude times one of (m, longitude).
#pragma once

#include <algorithm>

#include "common.h"

static constexpr int64_t most_rows = (max_degree + 1) * (max_degree + 1);

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
