"""Kernels in C++ for what stands between the GEMMs of a message, on a CPU.

The `.cpp` files are compiled when they are first needed (`library`); `edges` and `sphere` call them. They
compute the same as the torch code of `kernels.edge_inputs`, `kernels.edge_sums` and `kernels.s2_grid`.
"""
