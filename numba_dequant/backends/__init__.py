"""The devices that compute: the reference, the CPU, the simulator of Numba, and NVIDIA GPUs."""
