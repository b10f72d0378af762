"""Code that Numba compiles, for the CPU and for GPUs."""
