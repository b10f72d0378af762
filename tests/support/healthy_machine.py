"""What `numba-dequant doctor` finds in a machine in which everything works."""

HEALTHY = {
    "packages": {"numpy": "2.4.6", "numba": "0.68.1", "numba-cuda": "0.30.4", "cuda-bindings": "13.5.0"}
    | dict.fromkeys(("nvidia-nvvm", "nvidia-nvjitlink"), "13.5.37"),
    "environment": {},
    "is_container": False,
    "has_gpu": True,
    "cpu": {"compared": 16384},
    "cache": {"problem": None, "directory": "/home/me/.cache/numba_dequant", "is_kept": True},
    "driver": {"cuda": 13000, "driver": "580.65"},
    "gpu_packages": {"missing": [], "is_simulated": False},
    "toolkit": {"problem": None},
    "gpus": {"gpus": [{"device": "cuda:0", "name": "NVIDIA H100", "capability": [9, 0], "compared": 16384}]},
}
