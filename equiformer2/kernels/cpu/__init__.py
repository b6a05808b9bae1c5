"""C++ kernels for the work between the GEMMs of a message, on a CPU.

The `.cpp` files are compiled when they are first needed (`library`); `edges` and `sphere` call them. They
compute the same as the torch code of `kernels.convolve`, `kernels.aggregate` and `kernels.s2_grid`.
"""
