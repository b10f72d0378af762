"""Each primitive by itself: a compiled target has the bits of the plain Python body."""

import inspect

import numpy as np
import pytest
from blocks import assert_same_bits
from numba import njit
from primitives import ALIGNMENTS, CASES, compiled_outcome, outcome

import numba_dequant as nd
from numba_dequant import bits, halves
from numba_dequant.kernels import intrinsics_cpu

assert intrinsics_cpu  # it teaches Numba the primitives


@pytest.mark.parametrize("itemsize", ALIGNMENTS)
@pytest.mark.parametrize("name", CASES)
def test_on_the_cpu(name, itemsize):
    run, dtype, size = CASES[name]
    compiled = njit(run)
    for seed in range(4):
        found = compiled_outcome(compiled, itemsize, dtype, size, seed)
        assert_same_bits(found, outcome(run, itemsize, dtype, size, seed))


def test_every_primitive_has_its_case():
    """But for those of a kernel, which the kernels' tests cover: they copy, and exchange values between threads."""
    of_kernels = {"copy_16_bytes", "copy_byte", "is_aligned", "store_float32_in_pairs", "stop_unless", "helper"}
    there = {name for name, value in vars(bits).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert there - of_kernels == {name for name in CASES if " " not in name} - {"arithmetic"}


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 2**32 - 1])
def test_an_integer_that_compiled_code_would_cut_is_an_error(number):
    with pytest.raises(OverflowError, match="32 bits"):
        bits.to_float(number)
    assert bits.to_float(2**31 - 1) == 2.0**31


@pytest.mark.parametrize("centre", [-1, 2**23])
def test_a_centre_that_a_kernel_would_make_another_number_is_an_error(centre):
    with pytest.raises(OverflowError, match="centre"):
        bits.centred_bytes(0, centre)


@pytest.mark.parametrize("dtype", ["u1", "u4", "f4", "?"])
def test_a_table_that_compiled_code_would_misread_is_an_error(dtype):
    with pytest.raises(nd.OptionError, match="signed integers"):
        bits.LookupTable(np.zeros(16, dtype))


def test_a_load_that_a_kernel_could_not_do_is_an_error():
    """Plain Python checks what compiled code does not: the alignment, and the end of the array."""
    words = np.arange(4, dtype=np.uint32)
    for at in (1, 2, 6):
        with pytest.raises(ValueError, match=f"misaligned load of 4 bytes at byte {at}; the array is aligned to 4"):
            bits.load_u32(words, at)
    assert bits.load_u32(words, 12) == 3
    with pytest.raises(IndexError, match="load of 4 bytes at byte 16 exceeds the array of 16 bytes"):
        bits.load_u32(words, 16)
    pairs = words.view(np.uint16)
    assert bits.load_u16(pairs, 14) == 0
    with pytest.raises(IndexError, match="load of 4 bytes at byte 14 exceeds"):
        bits.load_u32(pairs, 14)


def test_a_kernel_ends_at_a_wrong_index_and_waits_for_no_flag_that_is_never_raised():
    bits.stop_unless(True)
    with pytest.raises(IndexError, match="an index is out of range"):
        bits.stop_unless(False)
    flags = np.zeros(2, np.uint32)
    halves.raise_flag(flags, 1)
    halves.wait_for_flag(flags, 1)
    with pytest.raises(RuntimeError, match="a thread block waits for one that has not run"):
        halves.wait_for_flag(flags, 0)
