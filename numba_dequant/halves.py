"""The primitives of products: eight float16 at a time, and the tensor cores.

As in `bits.py`, each is a plain Python function, which can be stepped through and which runs in Numba's CUDA simulator.
On a GPU, `kernels/intrinsics_halves.py` and `kernels/intrinsics_mma.py` replace the bodies with machine instructions.

Eight float16 fill four registers, two in each. Their order is `PACKED`, because the mask 0x00FF00FF selects the bytes 0
and 2 of a word of four bytes, which become the two float16 of a register.

A product is computed by the 32 threads of a warp together. For every 8 columns, `multiply` executes the instruction
``mma.sync.m16n8k16`` twice: 16 rows of weights times 8 columns, over 32 elements. Thread `lane` of a warp holds eight
elements of row ``lane // 4``, eight of row ``lane // 4 + 8``, eight of column ``lane // 4``, and the results of these
two rows in the columns ``2 * (lane % 4)`` and ``2 * (lane % 4) + 1``. Threads with the same ``lane % 4`` hold elements
with the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_dequant import bits

PACKED = (0, 2, 1, 3, 4, 6, 5, 7)
"""The order of eight float16 in four registers."""

LANES = 32
"""Threads of a warp."""


def halves_of_bytes(eight: int, centre: int) -> NDArray[np.float16]:
    """Eight bytes, packed in an integer, as float16, with `centre` subtracted from each."""
    values: NDArray[np.float16] = bits.centred_bytes(eight, centre).astype(np.float16)
    return values[list(PACKED)]


def halves_of_fields(eight: int, shift: int, width: int, centre: int) -> NDArray[np.float16]:
    """The bits `shift` to ``shift + width - 1`` of eight bytes, as float16, with `centre` subtracted from each."""
    return halves_of_bytes((eight >> shift) & (0x0101010101010101 * ((1 << width) - 1)), centre)


def scaled_fields(eight: int, shift: int, width: int, scale: NDArray[np.float16]) -> NDArray[np.float16]:
    """The bits `shift` to ``shift + width - 1`` of eight bytes, as float16, times `scale`.

    `scale` is an integer from 0 to 63, from `equal_halves` or `byte_as_halves`.
    """
    product: NDArray[np.float16] = halves_of_fields(eight, shift, width, 0) * scale
    return product


def halves_of_nibbles(four: int, centre: int) -> NDArray[np.float16]:
    """Four bytes, packed in an integer: their low nibbles, then their high nibbles, with `centre` subtracted."""
    return halves_of_fields((four & 0x0F0F0F0F) | ((four >> 4 & 0x0F0F0F0F) << 32), 0, 4, centre)


def halves_of_pairs(two: int, centre: int) -> NDArray[np.float16]:
    """Eight numbers of two bits, packed in 16, as float16, with `centre` subtracted from each."""
    return halves_of_bytes(sum(((two >> (2 * k)) & 3) << (8 * k) for k in range(8)), centre)


def halves_of_signs(byte: int) -> NDArray[np.float16]:
    """Eight bits as float16: 1 for a set bit, -1 for a clear bit."""
    return halves_of_bytes(bits.spread_bits(byte) << 1, 1)


def negated(halves: NDArray[np.float16], minus: int) -> NDArray[np.float16]:
    """Eight float16, of which those whose bit in `minus` is set are negated."""
    return halves * -halves_of_signs(minus)


def halves_of_table(table: bits.LookupTable, four: int) -> NDArray[np.float16]:
    """The eight nibbles of four bytes, looked up in a table of 8 or 16 signed bytes.

    The order is: the low nibbles of the first two bytes, their high nibbles, then those of the other two bytes. This is
    the order `PACKED` of the nibbles.
    """
    nibbles = [(four >> (8 * byte + 4 * high)) & 15 for pair in (0, 2) for high in (0, 1) for byte in (pair, pair + 1)]
    return table.items[nibbles].astype(np.float16)


def scaled_halves_of_table(table: bits.LookupTable, four: int, scale: NDArray[np.float16]) -> NDArray[np.float16]:
    """The result of `halves_of_table` times `scale`, eight equal integers from -56 to 56; rounded to nearest even."""
    product: NDArray[np.float16] = halves_of_table(table, four) * scale
    return product


def lookup_in_tile(tile: Any, table: bits.LookupTable, index: int) -> int:
    """One item of a table, whose copy is at the start of the array of a kernel; see `Factors.table`."""
    return bits.lookup(table, index)


def copy_to_tile(tile: Any, table: bits.LookupTable, index: int) -> None:
    """Copy an item of a table to its place at the start of an array."""
    size = table.items.itemsize
    tile.view(np.uint8)[size * index : size * (index + 1)] = table.items[index : index + 1].view(np.uint8)


def scaled(halves: NDArray[np.float16], scale: NDArray[np.float16]) -> NDArray[np.float16]:
    """Eight float16 times `scale`, eight equal ones; each product is rounded to nearest even."""
    product: NDArray[np.float16] = halves * scale
    return product


def rounded_halves(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Eight float32, rounded to nearest even."""
    return values.astype(np.float16)[list(PACKED)]


def equal_halves(number: int) -> NDArray[np.float16]:
    """An integer from -512 to 511 as eight equal float16."""
    return np.full(8, number, np.float16)


def halves_with_bits(bits_of_half: int) -> NDArray[np.float16]:
    """The float16 with these 16 bits, eight times."""
    return np.full(8, np.uint16(bits_of_half).view(np.float16), np.float16)


def byte_as_halves(eight: int, index: int, centre: int) -> NDArray[np.float16]:
    """One of eight bytes, packed in an integer, minus `centre`, as eight equal float16."""
    return equal_halves(((eight >> (8 * index)) & 255) - centre)


def largest_bfloat16(halves: NDArray[np.float16]) -> int:
    """The largest of eight bfloat16, as its bits without the sign; they are loaded as if they were float16."""
    return int((halves.view(np.uint16) & 0x7FFF).max())


def scaled_bfloat16(halves: NDArray[np.float16], factor: Any) -> NDArray[np.float16]:
    """Eight bfloat16, loaded as if they were float16, times `factor`, as float16."""
    with np.errstate(all="ignore"):
        values = (halves.view(np.uint16).astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
        return values.astype(np.float16)


def load_run(x: Any, at: int) -> NDArray[np.float16]:
    """Eight float16, from 16 aligned bytes."""
    return _load_halves(x, at, 8)[list(PACKED)]


def load_two_fours(x: Any, first: int, second: int) -> NDArray[np.float16]:
    """Four float16 from eight aligned bytes, and four from eight others: two of each, then the other two of each."""
    return np.concatenate([_load_halves(x, start, 4)[half : half + 2] for half in (0, 2) for start in (first, second)])


def packed(halves: NDArray[np.float16]) -> NDArray[np.float16]:
    """The result of `load_two_fours` in the order of `halves_of_nibbles`."""
    return halves[[0, 4, 1, 5, 2, 6, 3, 7]]


def _load_halves(x: Any, at: int, count: int) -> NDArray[np.float16]:
    return np.frombuffer(x.view(np.uint8)[at : at + 2 * count].tobytes(), np.float16)


def store_halves(out: Any, at: int, halves: NDArray[np.float16]) -> None:
    """Store eight float16 in 16 aligned bytes, in their order in registers."""
    out.view(np.uint8)[at : at + 16] = halves.view(np.uint8)


class Order(NamedTuple):
    """Which eight elements of a group of 32 each of four threads holds.

    Attributes:
        elements: for each thread, the numbers of its elements in their order in registers.
        load: ``load(x, at, quarter)``: the float16 of thread `quarter`, if the group starts at byte `at` of a column.
    """

    elements: tuple[tuple[int, ...], ...]
    load: Callable[[Any, int, int], Any]


def _load_runs(x: Any, at: int, quarter: int) -> Any:
    return load_run(x, at + 16 * quarter)


RUNS = Order(tuple(tuple(8 * lane + element for element in PACKED) for lane in range(4)), _load_runs)
"""Eight consecutive elements."""


def _load_nibbles(x: Any, at: int, quarter: int) -> Any:
    return packed(load_two_fours(x, at + 8 * quarter, at + 8 * quarter + 32))


NIBBLES = Order(
    tuple(tuple(4 * lane + element for element in (0, 2, 1, 3, 16, 18, 17, 19)) for lane in range(4)), _load_nibbles
)
"""The elements in four bytes, if byte k holds element k in its low and element k + 16 in its high nibble."""


def _load_looked_up(x: Any, at: int, quarter: int) -> Any:
    return load_two_fours(x, at + 8 * quarter, at + 8 * quarter + 32)


LOOKED_UP_NIBBLES = Order(
    tuple(tuple(4 * lane + element for element in (0, 1, 16, 17, 2, 3, 18, 19)) for lane in range(4)), _load_looked_up
)
"""The same elements as in `NIBBLES`, in the order of `halves_of_table`."""


def _load_looked_up_16(x: Any, at: int, quarter: int) -> Any:
    start = at + 32 * (quarter >> 1) + 8 * (quarter & 1)
    return load_two_fours(x, start, start + 16)


LOOKED_UP_NIBBLES_OF_16 = Order(
    tuple(
        tuple(16 * (lane >> 1) + 4 * (lane & 1) + element for element in (0, 1, 8, 9, 2, 3, 10, 11))
        for lane in range(4)
    ),
    _load_looked_up_16,
)
"""As `LOOKED_UP_NIBBLES`, if byte k of eight holds elements k and k + 8."""


def no_sums_8() -> NDArray[np.float32]:
    """The four results of a thread for 8 columns, before the first product."""
    return np.zeros(4, np.float32)


def no_sums_16() -> NDArray[np.float32]:
    """The eight results of a thread for 16 columns, before the first product."""
    return np.zeros(8, np.float32)


def no_sums_32() -> NDArray[np.float32]:
    """The 16 results of a thread for 32 columns, before the first product."""
    return np.zeros(16, np.float32)


def no_sums_64() -> NDArray[np.float32]:
    """The 32 results of a thread for 64 columns, before the first product."""
    return np.zeros(32, np.float32)


def no_sums_128() -> NDArray[np.float32]:
    """The 64 results of a thread for 128 columns, before the first product."""
    return np.zeros(64, np.float32)


def multiply(sums: Any, upper: Any, lower: Any, x: Any, at: int, step: int, thread: int) -> NDArray[np.float32]:
    """Add the products of 16 rows and 8 to 64 columns over 32 elements; all threads of a warp call this together.

    Args:
        sums: float32, the results of this thread so far, four for every 8 columns.
        upper: eight float16 weights of row ``lane // 4``.
        lower: eight float16 weights of row ``lane // 4 + 8``.
        x: array with the eight elements of column ``lane // 4``, as float16.
        at: the byte of `x` where they start, a multiple of 16.
        step: bytes to the same elements of the column that is 8 further.
        thread: the number of this thread.
    """
    starts = range(at, at + step * (len(sums) // 4), step) if len(sums) > 4 else [at]
    column = [x.view(np.uint8)[start : start + 16].view(np.float16) for start in starts]
    lanes = _exchange(int(thread), (upper, lower, column))
    row, pair = thread % LANES // 4, thread % 4
    # Of (row half, element) and (tile, one of the two columns, element).
    weights = np.concatenate([lanes[4 * row + quarter][:2] for quarter in range(4)], axis=1, dtype=np.float32)
    elements = np.concatenate(
        [[lanes[4 * (2 * pair + which) + quarter][2] for which in range(2)] for quarter in range(4)],
        axis=2, dtype=np.float32,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        products = weights[None, :, None] * elements.transpose(1, 0, 2)[:, None]
        return np.array(sums + products.sum(axis=3).reshape(-1), np.float32)


def multiply_panel(sums: Any, upper: Any, lower: Any, x: Any, at: int, thread: int) -> NDArray[np.float32]:
    """Begin to add the products of 64 rows and 32, 64 or 128 columns over 32 elements; four warps call this together.

    The results may be read after `wait_for_panels`. Until then, the elements must stay as they are.

    Args:
        sums: the results of this thread so far, four for every 8 columns.
        upper: eight weights of row ``lane // 4`` of the warp.
        lower: eight weights of row ``lane // 4 + 8`` of the warp.
        x: array in shared memory with the elements of the columns, as `store_in_panel` puts them.
        at: the byte of `x` where they start, a multiple of 128.
        thread: the number of this thread.
    """
    lanes = _exchange(int(thread), (upper, lower))
    row, pair, n_eights = thread % LANES // 4, thread % 4, len(sums) // 4
    weights = np.concatenate([lanes[4 * row + quarter] for quarter in range(4)], axis=1, dtype=np.float32)
    panel = x.view(np.uint8)[at : at + n_eights * 512].view(np.float16).reshape(4, n_eights, 8, 4, 2)
    elements = panel.transpose(1, 2, 3, 0, 4).reshape(n_eights, 8, 32)[:, 2 * pair : 2 * pair + 2].astype(np.float32)
    with np.errstate(all="ignore"):
        products = weights[None, :, None] * elements[:, None]
        return np.array(sums + products.sum(axis=3).reshape(-1), np.float32)


def multiply_first_panel(sums: Any, upper: Any, lower: Any, x: Any, at: int, thread: int) -> NDArray[np.float32]:
    """As `multiply_panel`, with as many results, which are 0 so far."""
    return multiply_panel(np.zeros(len(sums), np.float32), upper, lower, x, at, thread)


def wait_for_panels(sums: Any) -> NDArray[np.float32]:
    """The results, after all products that this thread has begun are added."""
    return np.array(sums, np.float32)


def store_in_panel(out: Any, at: int, halves: NDArray[np.float16], step: int) -> None:
    """Store four pairs of float16, each `step` bytes after the one before: 16 bytes for each column of the panel."""
    for pair, words in enumerate(halves.view(np.uint8).reshape(4, 4)):
        out.view(np.uint8)[at + pair * step : at + pair * step + 4] = words


def make_barrier(tile: Any, at: int) -> None:
    """Make a barrier of eight bytes in shared memory, for which `wait_for_copy` waits."""


def begin_copy(tile: Any, at: int, data: Any, address: int, n_bytes: int, barrier: int) -> None:
    """Begin to copy `n_bytes` bytes to byte `at` of `tile`; one thread calls this.

    The bytes start at `address`, which is counted from `address_of` the data. Threads can wait for them at the barrier
    that starts at byte `barrier`. `at`, `address` and `n_bytes` are multiples of 16.
    """
    tile.view(np.uint8)[at : at + n_bytes] = data.view(np.uint8)[address : address + n_bytes]


def wait_for_copy(tile: Any, barrier: int, parity: int) -> None:
    """Wait for a copy at a barrier. `parity` is 0 for the first copy there, 1 for the second, then 0 again."""


def multiply_sums(
    sums: Any, minima: tuple[Any, Any, Any, Any], x: Any, at: int, step: int, thread: int
) -> NDArray[np.float32]:
    """Add the products of eight minima of 16 rows and the sums of columns over the elements that they belong to.

    This is ``mma.sync.m16n8k8`` in TF32, twice, because a sum is the sum of two TF32 numbers.

    Args:
        sums: the results of this thread so far, four for every 8 columns.
        minima: with ``k = thread % 4``, minimum k of rows ``lane // 4`` and ``lane // 4 + 8``, then minimum k + 4.
        x: array with the sums of column ``lane // 4``.
        at: the byte of `x`, a multiple of 16, where the upper parts of sums k and k + 4 and their lower parts start.
        step: bytes to the same sums of the column that is 8 further.
        thread: the number of this thread.
    """
    starts = range(at, at + step * (len(sums) // 4), step) if len(sums) > 4 else [at]
    column = [x.view(np.uint8)[start : start + 16].view(np.float32) for start in starts]
    lanes = _exchange(int(thread), (minima, [four[:2] + four[2:] for four in column]))
    row, pair = thread % LANES // 4, thread % 4
    result = np.array(sums, np.float32)
    for index in range(len(result)):
        tile, row_half, which = index // 4, index // 2 % 2, index % 2
        for quarter in range(4):
            of_row = lanes[4 * row + quarter][0]
            of_column = lanes[4 * (2 * pair + which) + quarter][1][tile]
            with np.errstate(all="ignore"):
                result[index] += of_row[row_half] * of_column[0] + of_row[2 + row_half] * of_column[1]
    return result


def sum_of_halves(halves: NDArray[np.float16]) -> np.float32:
    """The sum of eight float16."""
    with np.errstate(all="ignore"):
        return np.float32(halves.astype(np.float32).sum(dtype=np.float32))


def plus_lane(value: Any, distance: int, thread: int) -> np.float32:
    """The sum of `value` and the value of the thread whose number differs in the bit `distance`."""
    lanes = _exchange(int(thread), value)
    with np.errstate(all="ignore"):
        return np.float32(value + lanes[thread % LANES ^ distance])


def store_sum(out: Any, at: int, value: Any) -> None:
    """Store a float32 as the sum of two TF32 numbers: the upper one at byte `at`, the lower one 8 bytes further."""
    upper = np.float32(value).view(np.uint32) & np.uint32(0xFFFFE000)
    with np.errstate(all="ignore"):
        both = np.array([upper.view(np.float32), value - upper.view(np.float32)], np.float32)
    for part, start in zip(both, (at, at + 8), strict=True):
        out.view(np.uint8)[start : start + 4] = np.array([part]).view(np.uint8)


def add_scaled(sums: Any, more: Any, upper: Any, lower: Any) -> NDArray[np.float32]:
    """Add results times the scales of their rows, `upper` and `lower`."""
    scales = np.array([upper, upper, lower, lower] * (len(sums) // 4), np.float32)
    with np.errstate(all="ignore"):
        return np.array(sums + more * scales, np.float32)


def store_sums(out: Any, at: int, sums: Any, step: int) -> None:
    """Store all results of this thread, each `step` bytes after the one before."""
    for index, result in enumerate(sums):
        out.view(np.uint8)[at + index * step : at + index * step + 4] = np.array([result]).view(np.uint8)


def add_stored_sums(sums: Any, data: Any, at: int, step: int) -> NDArray[np.float32]:
    """Add results that another thread block has stored with `store_sums`."""
    starts = range(at, at + step * len(sums), step)
    others = [data.view(np.uint8)[start : start + 4].view(np.float32)[0] for start in starts]
    with np.errstate(all="ignore"):
        return np.array(sums + np.array(others), np.float32)


def raise_flag(flags: Any, index: int) -> None:
    """Set a uint32 in device memory to 1.

    A thread that reads the 1 also sees what this thread block wrote before its last barrier.
    """
    flags.view(np.uint32)[index] = 1


def wait_for_flag(flags: Any, index: int) -> None:
    """Wait until a flag is raised.

    In the simulator, it must be raised already, because thread blocks run one after the other.
    """
    if not flags.view(np.uint32)[index]:
        raise RuntimeError("a thread block waits for one that has not run")


def let_copies_overwrite() -> None:
    """Order the accesses of this thread to shared memory before the copies that one thread begins after a barrier."""


def item(sums: Any, index: int) -> np.float32:
    """One of the results."""
    return np.float32(sums[index])


def repeated(value: Any) -> NDArray[np.float32]:
    """A float32, eight times."""
    return np.full(bits.RUN, value, np.float32)


def copy_pieces(tile: Any, at: int, data: Any, address: int, quarter: int, pieces: int) -> None:
    """Begin to copy the pieces `quarter`, ``quarter + 4``, ... of `pieces`; each is 16 aligned bytes.

    The first one is at `address`, counted from `address_of` the data, and goes to byte `at` of `tile`.
    """
    copy_pieces_or_zeros(tile, at, data, address, 16 * (pieces - quarter), quarter, pieces)


def copy_pieces_or_zeros(tile: Any, at: int, data: Any, address: int, n_bytes: int, quarter: int, pieces: int) -> None:
    """As `copy_pieces`, but after the first `n_bytes` the pieces become 0, and no data is read."""
    target, source = tile.view(np.uint8), data.view(np.uint8)
    for step in range(0, 16 * (pieces - quarter), 64):
        size = min(max(n_bytes - step, 0), 16)
        target[at + step : at + step + 16] = 0
        target[at + step : at + step + size] = source[address + step :][:size]


def end_group() -> None:
    """Make a group of the copies that this thread has begun since its last call."""


def wait_for_groups(n: int) -> None:
    """Wait until at most `n` groups of copies of this thread have not arrived yet."""


def address_of(data: Any) -> int:
    """The address of the first byte. In plain Python it is 0, because arrays are indexed by bytes there."""
    return 0


def let_next_kernel_start() -> None:
    """Let the next kernel in the stream begin, if it was launched to overlap with this one."""


def wait_for_earlier_kernels() -> None:
    """Wait until the earlier kernels of the stream have ended and their results can be read."""


def synchronize_warp(thread: int) -> None:
    """Wait for the other threads of the warp. What they have written to shared memory can then be read."""
    _exchange(int(thread), None)


class _Warp:
    """A simulated warp, whose threads are Python threads that exchange values."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(LANES, timeout=60)
        self.items: list[list[Any]] = [[None] * LANES, [None] * LANES]
        self.turns = [0] * LANES


_warps: dict[int, _Warp] = {}
_warps_lock = threading.Lock()


def _exchange(thread: int, value: Any) -> list[Any]:
    """Pass `value` to all threads of the warp, and return the values of all threads."""
    with _warps_lock:
        warp = _warps.setdefault(thread // LANES, _Warp())
    lane = thread % LANES
    # Two lists are used in turn: a slow thread may still read one while the others write to the next.
    warp.turns[lane] ^= 1
    items = warp.items[warp.turns[lane]]
    items[lane] = value
    warp.barrier.wait()
    return items
