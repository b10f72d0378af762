"""What `numba-dequant doctor` finds in a machine in which everything works."""

from copy import deepcopy

from numba_dequant.cli import diagnosis

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


def diagnosed(*changes):
    facts = deepcopy(HEALTHY)
    for change in changes:
        for key, value in change.items():
            facts[key] = facts[key] | value if isinstance(value, dict) and key == "environment" else value
    return {check.name: check for check in diagnosis.diagnose(facts)}


NO_HOME = "there is no home directory for the cache of compiled code; set NUMBA_DEQUANT_CACHE_DIR to a directory"
