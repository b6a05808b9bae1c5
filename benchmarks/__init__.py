"""Measurements of the package: against fairchem-core, of readers, batches, kernels and symmetries.

Run from the clone, never installed. The comparison with fairchem-core has a driver (`compare_fairchem`) and a
worker process for each implementation (`worker`).
"""
