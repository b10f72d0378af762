"""Reads chunks of files, and detects files that have changed since they were opened.

Files are read, not memory-mapped: access to the map of a truncated file would end the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from io import RawIOBase

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import allocated
from numba_dequant.errors import DeviceError, ReadError, shown
from numba_dequant.gguf.source import CHANGED, read_into
from numba_dequant.gguf.source import read_error as error_of_system
from numba_dequant.gguf.tensors import TensorInfo, truncated
from numba_dequant.loading.chunks import Chunk, TensorSlice


class OpenFiles:
    """The open files of one thread, checked for changes since their headers were read."""

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
            GgufError: the file ends before the end of the tensor.
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
            incomplete = next(tensors[part.index] for part in chunk.parts if part.at + part.n_bytes > count)
            check_unchanged(incomplete, file)
            raise truncated(incomplete, chunk.offset + count)
        check_unchanged(first, file)
        for part in chunk.parts:
            if tensors[part.index].byte_order == "big":
                swap_bytes(data[part.at : part.at + part.n_bytes], tensors[part.index])
        return data


def open_unchanged(tensor: TensorInfo) -> RawIOBase:
    """The file of a tensor, opened for reading.

    Raises:
        GgufError: the file was truncated before the end of the tensor.
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
    """Check that a file has not changed since its header was read; see `Source.is_unchanged`.

    Raises:
        GgufError: the file was truncated before the end of the tensor.
        ReadError: it was replaced, or has changed.
    """
    source = tensor.source
    try:
        if source.is_unchanged(file):
            return
        size = source.size(file)
        is_truncated = source.is_cut_short(file) and size < tensor.offset + tensor.n_bytes
    except OSError as error:
        raise read_error(tensor, tensor.offset, error) from error
    raise truncated(tensor, size) if is_truncated else changed(tensor)


def changed(tensor: TensorInfo) -> ReadError:
    """The error for a file that has changed since its header was read."""
    return ReadError(tensor.path, tensor.name, tensor.offset, CHANGED)


def read_error(tensor: TensorInfo, offset: int, error: OSError) -> ReadError:
    """The error for a file that cannot be read."""
    return error_of_system(tensor.path, error, tensor.name, offset)


def check_complete(tensor: TensorInfo) -> None:
    """Check that the file has the whole tensor by now, if it was incomplete when it was opened.

    Raises:
        GgufError: the file ends before the end of the tensor.
        ReadError: it cannot be opened, or has changed since its header was read.
    """
    end = tensor.offset + tensor.n_bytes
    if tensor.n_bytes and end > tensor.source.stamp.size:
        with open_unchanged(tensor) as file:
            size = tensor.source.size(file)
        if end > size:
            raise truncated(tensor, size)


def read_tensor(tensor: TensorInfo) -> NDArray[np.uint8]:
    """The compressed bytes of a tensor in the byte order of this machine: a copy, or a read-only view of memory.

    Raises:
        GgufError: the file ends before the end of the tensor.
        ReadError: the file cannot be read, or has changed since it was opened.
        DeviceError: there is not enough memory.
    """
    check_complete(tensor)
    if tensor.source.data is not None and tensor.byte_order == "little":
        return _read_only(tensor.source.data[tensor.offset : tensor.offset + tensor.n_bytes])
    try:
        buffer = allocated(lambda: np.empty(tensor.n_bytes, np.uint8), tensor.n_bytes, "its blocks")
    except DeviceError as error:
        raise DeviceError(f"{tensor.path}: tensor {shown(tensor.name)}: {error}") from error
    if not tensor.n_bytes:
        return buffer
    chunk = Chunk(tensor.path, tensor.offset, tensor.n_bytes, [TensorSlice(0, 0, 0, tensor.n_bytes)])
    with OpenFiles() as files:
        return files.read(chunk, [tensor], buffer)


def map_tensor(tensor: TensorInfo) -> NDArray[np.uint8]:
    """The compressed bytes of a tensor as a read-only memory map.

    For a model in memory, and for a file in the other byte order, the result is that of `read_tensor`.

    Raises:
        GgufError: the file ends before the end of the tensor.
        ReadError: the file cannot be mapped or read, or has changed since it was opened.
        DeviceError: there is not enough memory for a copy.
    """
    if tensor.source.data is not None or tensor.byte_order == "big" or not tensor.n_bytes:
        return read_tensor(tensor)
    check_complete(tensor)
    with open_unchanged(tensor) as file:
        try:
            array = np.memmap(file, np.uint8, "r", tensor.offset, (tensor.n_bytes,))
        except OSError as error:
            raise read_error(tensor, tensor.offset, error) from error
        except ValueError:  # the file was truncated just now
            raise truncated(tensor, tensor.source.size(file)) from None
    return array.view(np.ndarray)


def _read_only(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = data.view()
    view.flags.writeable = False
    return view


def swap_bytes(data: NDArray[np.uint8], tensor: TensorInfo) -> None:
    """Convert blocks to the byte order of this machine, in place."""
    layout = tensor.format.layout
    data.view(layout)[:] = data.view(layout.newbyteorder(">")).astype(layout)
