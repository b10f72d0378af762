"""The rates of a machine, for the cost model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf

from numba_dequant.errors import OptionError, shown


@dataclass(frozen=True)
class Machine:
    """The rates of hosts that are all alike, in bytes per second and direction: 1 GB/s is 1e9.

    Attributes:
        page_cache: from the page cache of a host to all its ranks together.
        bus: from host memory to one GPU.
        nvlink: from one GPU to another GPU of the host.
        network: from one host to the others. Its ranks share it.
        memory: of the memory of one GPU, bytes read plus bytes written.
        gpus_per_host: the number of GPUs of a host, one per rank. Consecutive ranks are on the same host.
        latency: seconds of a collective, a send or a receive that moves no bytes.
        reader: from the page cache to one rank.
        host_bus: from host memory to all GPUs of the host together.
        disk: of the disk of a host, if the file is not in the page cache.

    Raises:
        OptionError: a value has a wrong type or is out of range.
    """

    page_cache: float
    bus: float
    nvlink: float
    network: float
    memory: float
    gpus_per_host: int = 8
    latency: float = 0.0
    reader: float = inf
    host_bus: float = inf
    disk: float = inf

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            kind, what = (int, "a whole number") if name == "gpus_per_host" else ((int, float), "a number")
            least = "0 or more, and finite" if name == "latency" else "more than 0"
            # A comparison with NaN is false.
            if not isinstance(value, kind) or not (0 <= value < inf if name == "latency" else value > 0):
                raise OptionError(f"{name} is {shown(value)}, but must be {what}, {least}")
