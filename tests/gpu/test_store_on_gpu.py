"""Kernels that a GPU has run are kept on disk."""

import pytest
from processes import assert_processes_keep

import numba_dequant as nd

pytestmark = pytest.mark.gpu


def compute_on_gpu():
    return nd.dequantize(bytes(range(34)), "Q8_0", device="cuda").copy_to_host()


def test_twenty_processes_at_once(empty_store):
    """The first use of a GPU also keeps that a toolkit is there."""
    assert_processes_keep(20, compute_on_gpu, empty_store, 2, ["numba_dequant.kernels.dequantize"])
