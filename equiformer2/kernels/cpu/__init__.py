"""Kernels in C++ for what stands between the GEMMs of a message, on a CPU.

`kernels.cpp` is compiled when it is first needed (`library`); `edges` and `sphere` call it. What they compute
is said by the torch code that they stand in for: `kernels.edge_inputs`, `kernels.edge_sums`,
`kernels.s2_grid`.
"""
