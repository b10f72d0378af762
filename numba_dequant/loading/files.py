"""Reading the bytes of chunks, and noticing when a file is not what it was.

Files are read, not mapped: a file cut short under a map would end the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from io import RawIOBase

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import allocated
from numba_dequant.errors import DeviceError, ReadError
from numba_dequant.gguf.source import CHANGED, read_into
from numba_dequant.gguf.source import read_error as error_of_system
from numba_dequant.gguf.tensors import TensorInfo, truncated
from numba_dequant.loading.chunks import Chunk, TensorSlice


class OpenFiles:
    """The files that one thread has open, each as it was when its header was read."""

    def __init__(self) -> None:
        self._open: dict[str, RawIOBase] = {}
        self._stack = ExitStack()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, chunk: Chunk, tensors: Sequence[TensorInfo], buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Read a chunk to the start of `buffer`.

        Raises:
            ReadError: the file cannot be read, or has changed since it was opened.
            GgufError: the file ends before the tensor does.
        """
        first = tensors[chunk.parts[0].index]
        data = buffer[: chunk.n_bytes]
        file = self._open.get(chunk.path)
        if file is None:
            file = self._open[chunk.path] = self._stack.enter_context(open_unchanged(first))
        try:
            count = read_into(file, data, chunk.offset)
        except OSError as error:
            offset = max(file.tell(), chunk.offset)
            raise read_error(tensors[chunk.index_at(offset)], offset, error) from error
        if count < chunk.n_bytes:
            cut_short = next(tensors[part.index] for part in chunk.parts if part.at + part.n_bytes > count)
            check_unchanged(cut_short, file)
            raise truncated(cut_short, chunk.offset + count)
        check_unchanged(first, file)
        for part in chunk.parts:
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
            file = stack.enter_context(tensor.source.open())
        except OSError as error:
            raise read_error(tensor, tensor.offset, error) from error
        check_unchanged(tensor, file)
        stack.pop_all()
    return file


def check_unchanged(tensor: TensorInfo, file: RawIOBase) -> None:
    """Check that a file is the one whose header was read; see `Source.is_unchanged`.

    Raises:
        GgufError: it ends before the tensor does.
        ReadError: it is another, or has changed.
    """
    source = tensor.source
    try:
        if source.is_unchanged(file):
            return
        size = source.size(file)
        is_without_it = source.is_cut_short(file) and size < tensor.offset + tensor.n_bytes
    except OSError as error:
        raise read_error(tensor, tensor.offset, error) from error
    raise truncated(tensor, size) if is_without_it else changed(tensor)


def changed(tensor: TensorInfo) -> ReadError:
    """The error for a file that is not the one whose header was read."""
    return ReadError(tensor.path, tensor.name, tensor.offset, CHANGED)


def read_error(tensor: TensorInfo, offset: int, error: OSError) -> ReadError:
    """The error for a file that cannot be read."""
    return error_of_system(tensor.path, error, tensor.name, offset)


def check_complete(tensor: TensorInfo) -> None:
    """Check that a file that was taken although it was incomplete has the whole tensor by now.

    Raises:
        GgufError: it has not.
        ReadError: it cannot be opened.
    """
    end = tensor.offset + tensor.n_bytes
    if tensor.n_bytes and end > tensor.source.stamp.size:
        with open_unchanged(tensor) as file:
            size = tensor.source.size(file)
        if end > size:
            raise truncated(tensor, size)


def read_tensor(tensor: TensorInfo) -> NDArray[np.uint8]:
    """The compressed bytes of a tensor, in this machine's byte order: a copy, or a read-only view of bytes in memory.

    Raises:
        GgufError: the file ends before the tensor does.
        ReadError: the file cannot be read, or has changed since it was opened.
        DeviceError: there is not enough memory.
    """
    check_complete(tensor)
    if tensor.source.data is not None and tensor.byte_order == "little":
        return _read_only(tensor.source.data[tensor.offset : tensor.offset + tensor.n_bytes])
    try:
        buffer = allocated(lambda: np.empty(tensor.n_bytes, np.uint8), tensor.n_bytes, "its blocks")
    except DeviceError as error:
        raise DeviceError(f"{tensor.path}: tensor {tensor.name!r}: {error}") from error
    if not tensor.n_bytes:
        return buffer
    chunk = Chunk(tensor.path, tensor.offset, tensor.n_bytes, [TensorSlice(0, 0, 0, tensor.n_bytes)])
    with OpenFiles() as files:
        return files.read(chunk, [tensor], buffer)


def map_tensor(tensor: TensorInfo) -> NDArray[np.uint8]:
    """The compressed bytes of a tensor as a read-only map of its file; a copy where the byte order is another.

    Raises:
        GgufError: the file ends before the tensor does.
        ReadError: the file cannot be mapped, or has changed since it was opened.
    """
    if tensor.source.data is not None or tensor.byte_order == "big" or not tensor.n_bytes:
        return read_tensor(tensor)
    check_complete(tensor)
    with open_unchanged(tensor) as file:
        try:
            found = np.memmap(file, np.uint8, "r", tensor.offset, (tensor.n_bytes,))
        except OSError as error:
            raise read_error(tensor, tensor.offset, error) from error
        except ValueError:  # it has just been cut short
            raise truncated(tensor, tensor.source.size(file)) from None
    return found.view(np.ndarray)


def _read_only(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = data.view()
    view.flags.writeable = False
    return view


def swap_bytes(data: NDArray[np.uint8], tensor: TensorInfo) -> None:
    """Turn blocks of the other byte order into blocks of this machine's, where they are."""
    layout = tensor.format.layout
    data.view(layout)[:] = data.view(layout.newbyteorder(">")).astype(layout)
