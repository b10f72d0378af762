"""What Numba turns into machine code, for this processor and for GPUs."""
