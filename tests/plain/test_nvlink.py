"""Which GPUs NVLink connects, by what a driver says."""

import sys
from types import SimpleNamespace

import pytest

from numba_dequant.backends import nvlink
from numba_dequant.backends.nvlink import Links


class Driver:
    """A driver with GPUs at these addresses, of which some pairs have atomics; it fails for what `fails` names."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUdevice_P2PAttribute = SimpleNamespace(CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED=3)

    def __init__(self, addresses, pairs, fails=()):
        self.addresses, self.pairs, self.fails = addresses, pairs, fails

    def cuDeviceGetCount(self):  # noqa: N802
        return (100, 0) if "count" in self.fails else (0, len(self.addresses))

    def cuDeviceGetPCIBusId(self, size, index):  # noqa: N802
        address = self.addresses[index].encode()
        return (101, None) if index in self.fails else (0, address + bytes(size - len(address)))

    def cuDeviceGetP2PAttribute(self, attribute, source, target):  # noqa: N802
        assert attribute == 3
        return (217, None) if "pair" in self.fails else (0, int({source, target} in self.pairs))


@pytest.mark.parametrize(
    ("fails", "index", "links"),
    [
        ((), 0, Links("0000:06:00.0", frozenset({"0000:07:00.0"}))),
        ((), 1, Links("0000:07:00.0", frozenset({"0000:06:00.0", "0000:08:00.0"}))),
        (("pair",), 0, Links("0000:06:00.0", frozenset())),
        ((1,), 0, Links("0000:06:00.0", frozenset())),
        ((0,), 0, None),
        (("count",), 0, None),
        ((), 3, None),
    ],
)
def test_links(monkeypatch, fails, index, links):
    addresses = [f"0000:0{number}:00.0" for number in (6, 7, 8)]
    driver = Driver(addresses, [{0, 1}, {1, 2}], fails)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    nvlink.links_of.cache_clear()
    try:
        assert nvlink.links_of(index) == links
    finally:
        nvlink.links_of.cache_clear()
