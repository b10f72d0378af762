"""The devices that compute: the reference, the CPU, Numba's CUDA simulator, and NVIDIA GPUs."""
