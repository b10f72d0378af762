"""Reading the bytes of pieces, and noticing when a file is not what it was.

Files are read, not mapped: a file cut short under a map would end the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from io import RawIOBase
from typing import Self

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import ReadError
from numba_dequant.gguf_file import TensorInfo, truncated
from numba_dequant.gguf_header import stamp_of
from numba_dequant.pieces import Piece


class Files:
    """The files that one thread has open, each as it was when its header was read."""

    def __init__(self) -> None:
        self._open: dict[str, RawIOBase] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, piece: Piece, tensors: Sequence[TensorInfo], room: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Read a piece to the start of `room`.

        Raises:
            ReadError: the file cannot be read, or has changed since it was opened.
            GgufError: the file ends before the tensor does.
        """
        first = tensors[piece.parts[0].index]
        data = room[: piece.n_bytes]
        file = self._open.get(piece.path)
        if file is None:
            file = self._open[piece.path] = self._stack.enter_context(open_unchanged(first))
        try:
            count = read_into(file, data, piece.offset)
        except OSError as error:
            offset = max(file.tell(), piece.offset)
            raise read_error(tensors[piece.index_at(offset)], offset, error) from error
        if count < piece.n_bytes:
            raise truncated(next(tensors[p.index] for p in piece.parts if p.at + p.n_bytes > count))
        check_unchanged(first, file)
        for part in piece.parts:
            if tensors[part.index].byte_order == "big":
                swap_bytes(data[part.at : part.at + part.n_bytes], tensors[part.index])
        return data


def open_unchanged(tensor: TensorInfo) -> RawIOBase:
    """The file of a tensor, to be read.

    Raises:
        GgufError: it is shorter than it was, and ends before the tensor does.
        ReadError: it cannot be opened, or has changed since its header was read.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(tensor.path, "rb", buffering=0))
        except OSError as error:
            raise read_error(tensor, tensor.offset, error) from error
        check_unchanged(tensor, file)
        stack.pop_all()
    return file


def check_unchanged(tensor: TensorInfo, file: RawIOBase) -> None:
    """Check that a file is the one whose header was read, and has not been written to.

    Raises:
        GgufError: it is shorter than it was, and ends before the tensor does.
        ReadError: it is another, or has changed.
    """
    stamp = stamp_of(file.fileno())
    if not stamp.is_unchanged(tensor.stamp):
        if stamp.is_same_file(tensor.stamp) and stamp.size < tensor.offset + tensor.n_bytes:
            raise truncated(tensor)
        raise ReadError(tensor.path, tensor.name, tensor.offset, "it has changed since it was opened; open it anew")


def read_into(file: RawIOBase, data: NDArray[np.uint8], offset: int) -> int:
    """Fill `data` with the bytes from `offset` on; the result is how many there were."""
    file.seek(offset)
    done = 0
    while done < len(data):
        count = file.readinto(data[done:].data)
        if not count:
            break
        done += count
    return done


def read_error(tensor: TensorInfo, offset: int, error: OSError) -> ReadError:
    """The error for a file that cannot be read."""
    reason = f"{error.strerror or error}; check the disk, or copy the file anew"
    return ReadError(tensor.path, tensor.name, offset, reason)


def swap_bytes(data: NDArray[np.uint8], tensor: TensorInfo) -> None:
    """Turn blocks of the other byte order into blocks of this machine's, where they are."""
    layout = tensor.format.layout
    data.view(layout)[:] = data.view(layout.newbyteorder(">")).astype(layout)
