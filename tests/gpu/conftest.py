from numba_dequant.kernels.gpu_packages import is_there

# This puts something in place of the driver, under the packages that a GPU needs.
collect_ignore = [] if is_there("cuda.core") and is_there("numba_cuda") else ["test_gpu_faults.py"]
