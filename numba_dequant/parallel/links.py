"""Links between the GPUs of ranks that are much faster than the bus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Links(NamedTuple):
    """A GPU, and the GPUs that NVLink connects it with, as PCI addresses, which are the same in all processes."""

    gpu: str
    connected: frozenset[str]


def are_connected(links: Sequence[Links | None]) -> bool:
    """Whether NVLink connects each of these GPUs with each other one."""
    known = [each for each in links if each is not None]
    gpus = {each.gpu for each in known}
    return len(gpus) == len(links) and all(gpus <= {each.gpu} | each.connected for each in known)
