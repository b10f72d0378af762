"""Which GPUs of a machine are connected by NVLink, whose links are much faster than the bus."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

ADDRESS_BYTES = 32


class Links(NamedTuple):
    """A GPU, and the GPUs that NVLink connects it with, as PCI addresses, which are the same in all processes."""

    gpu: str
    connected: frozenset[str]


def are_connected(links: Sequence[Links | None]) -> bool:
    """Whether NVLink connects each of these GPUs with each other one."""
    known = [each for each in links if each is not None]
    gpus = {each.gpu for each in known}
    return len(gpus) == len(links) and all(gpus <= {each.gpu} | each.connected for each in known)


@lru_cache(maxsize=64)
def links_of(index: int) -> Links | None:
    """The links of a GPU to those that this process can use. None if the driver does not say it."""
    from cuda.bindings import driver

    code, count = driver.cuDeviceGetCount()
    n_gpus = count if code == driver.CUresult.CUDA_SUCCESS else 0
    addresses = {number: _address(driver, number) for number in range(n_gpus)}
    own = addresses.pop(index, None)
    if own is None:
        return None
    connected = (address for number, address in addresses.items() if address and _has_atomics(driver, index, number))
    return Links(own, frozenset(connected))


def _address(driver: Any, index: int) -> str | None:
    code, address = driver.cuDeviceGetPCIBusId(ADDRESS_BYTES, index)
    return address.split(b"\0")[0].decode() if code == driver.CUresult.CUDA_SUCCESS else None


def _has_atomics(driver: Any, source: int, target: int) -> bool:
    """Whether a GPU can do atomic operations in the memory of another one: over NVLink it can, over PCIe it cannot."""
    attribute = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    code, has_atomics = driver.cuDeviceGetP2PAttribute(attribute, source, target)
    return code == driver.CUresult.CUDA_SUCCESS and bool(has_atomics)
