"""The command `numba-dequant`."""
