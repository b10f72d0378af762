"""Which GPUs of a machine are connected by NVLink."""

from __future__ import annotations

from functools import lru_cache

from cuda.bindings import driver

from numba_dequant.parallel.links import Links

ADDRESS_BYTES = 32


@lru_cache(maxsize=64)
def links_of(index: int) -> Links | None:
    """The links of a GPU to those that this process can use. None if the driver does not say it."""
    code, count = driver.cuDeviceGetCount()
    addresses = {number: _address(number) for number in range(count if code == driver.CUresult.CUDA_SUCCESS else 0)}
    own = addresses.pop(index, None)
    if own is None:
        return None
    connected = {address for number, address in addresses.items() if address and _has_atomics(index, number)}
    return Links(own, frozenset(connected))


def _address(index: int) -> str | None:
    code, address = driver.cuDeviceGetPCIBusId(ADDRESS_BYTES, index)
    return address.split(b"\0")[0].decode() if code == driver.CUresult.CUDA_SUCCESS else None


def _has_atomics(source: int, target: int) -> bool:
    """Whether a GPU can do atomic operations in the memory of another one: over NVLink it can, over PCIe it cannot."""
    attribute = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    code, has_atomics = driver.cuDeviceGetP2PAttribute(attribute, source, target)
    return code == driver.CUresult.CUDA_SUCCESS and bool(has_atomics)
