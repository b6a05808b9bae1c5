"""Index arithmetic of the layouts in which features, radial weights and Wigner-D entries are stored."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class OrderLayout:
    """Layout of coefficients of degrees l <= L whose orders are cut to |m| <= M.

    "m-major" is the layout of the SO(2) convolutions (paper section 3.2): first m = 0 for l = 0..L, then for
    each m >= 1 the L+1-m coefficients of +m and those of -m. The "packed" entries of an edge are the Wigner-D
    blocks of l = 0..L one after another, row by row, with the rows m = 0, +1, -1, +2, -2, … (see
    `kernels.rotation`).

    The static methods take and return plain integers and call builtins alone, so that Triton evaluates the
    same functions while it compiles a kernel (`gpu.launch`).

    Attributes:
        lmax: highest degree L.
        mmax: highest order M. Orders above L have no rows.
    """

    lmax: int
    mmax: int

    @staticmethod
    def num_orders(l: int, mmax: int) -> int:
        """Count the orders m = 0, 1, … that degree l keeps."""
        return min(l, mmax) + 1

    @staticmethod
    def block_offset(l: int, mmax: int) -> int:
        """Find the first entry of the block of degree l among the packed entries of one edge."""
        return sum((2 * min(k, mmax) + 1) * (2 * k + 1) for k in range(l))

    @staticmethod
    def first_row(m: int, lmax: int) -> int:
        """Find the first m-major row of order m."""
        return 0 if m == 0 else (lmax + 1) + 2 * sum(lmax + 1 - k for k in range(1, m))

    @staticmethod
    def radial_row(l: int, m: int, lmax: int, shared_orders: bool) -> int:
        """Find the group of 2C radial weights that multiplies degree l of order m.

        With `shared_orders` all orders of a degree share one group.
        """
        return l if shared_orders else sum(lmax + 1 - k for k in range(m)) + l - m

    @property
    def num_rows(self) -> int:
        """R: coefficients with |m| <= M."""
        return self.first_row(min(self.lmax, self.mmax) + 1, self.lmax)

    @property
    def packed_size(self) -> int:
        """P: packed Wigner-D entries of one edge, without the zero that `kernels.rotation` appends."""
        return self.block_offset(self.lmax + 1, self.mmax)

    def radial_rows(self, shared_orders: bool) -> int:
        """Count the groups of 2C radial weights of all inputs of a convolution."""
        if shared_orders:
            return self.lmax + 1
        return self.radial_row(self.mmax, self.mmax, self.lmax, False) + self.lmax + 1 - self.mmax

    def rows(self) -> Iterator[tuple[int, int]]:
        """Give (l, m) of every m-major row, in sequence."""
        for m in range(self.mmax + 1):
            for sign in (1, -1) if m else (1,):
                yield from ((l, sign * m) for l in range(m, self.lmax + 1))
