"""From a GGUF file to arrays: `open`, `load`, and the `Model` between them."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from numba_dequant.api import dequantize
from numba_dequant.device import Place, place_named
from numba_dequant.dtypes import dtype_name
from numba_dequant.gguf_file import GgufFile, TensorInfo, open_gguf, truncated

if TYPE_CHECKING:
    from numba_dequant.staging import Staging

Select = str | Callable[[TensorInfo], bool] | None


class Model:
    """An open GGUF model, one file or all shards of a split; nothing but the header has been read.

    Attributes:
        metadata: the file's key-value pairs; arrays are read when they are looked at.
        tensors: name -> `TensorInfo` (format, shape, place in the file), in file order.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._staging: dict[int, Staging] = {}
        self.metadata: Mapping[str, Any] = file.metadata
        self.tensors: Mapping[str, TensorInfo] = file.tensors

    @property
    def path(self) -> str:
        """The file, or the first shard."""
        return str(self._file.path)

    def load(
        self, name: str, dtype: Any = "float16", device: str | None = None, out: Any = None, stream: Any = None
    ) -> Any:
        """One tensor, dequantized; arguments, result and errors are those of `numba_dequant.dequantize`.

        Raises:
            TensorNotFoundError: the file holds no tensor of that name.
            GgufError: the file is shorter than it was when it was opened.
        """
        tensor = self.tensors[name]
        place = place_named(device)
        if place.kind != "cuda" or tensor.byte_order == "big":
            data = self.read(name)
            return dequantize(data, tensor.format, dtype, tensor.shape, str(place), out, stream)
        from numba_dequant import gpu

        staging = self._staging_for(place)
        return gpu.load(
            lambda pointer, handle: staging.send(tensor, pointer, handle),
            tensor.n_bytes, tensor.format, dtype_name(dtype), tensor.shape, place.index, out, stream,
        )  # fmt: skip

    def load_all(
        self,
        select: Select = None,
        dtype: Any = "float16",
        device: str | None = None,
        stream: Any = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Every tensor, or those that `select` picks, by name and in file order.

        Args:
            select: a pattern of names ("blk.*.weight", as in file names), a function of a `TensorInfo`, or None.
            dtype: as for `load`.
            device: as for `load`.
            stream: as for `load`.
            progress: show a bar on a terminal or in a notebook.
        """
        place = str(place_named(device))
        dtype = dtype_name(dtype)
        from tqdm.auto import tqdm

        chosen = [tensor for tensor in self.tensors.values() if _picks(select, tensor)]
        loaded = {}
        total = sum(tensor.n_bytes for tensor in chosen)
        with tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
            for tensor in chosen:
                loaded[tensor.name] = self.load(tensor.name, dtype, place, stream=stream)
                bar.update(tensor.n_bytes)
        return loaded

    def read(self, name: str) -> NDArray[np.uint8]:
        """The compressed bytes of one tensor: a read-only map of the file where its byte order is this machine's."""
        tensor = self.tensors[name]
        if not tensor.n_bytes:
            return np.empty(0, np.uint8)
        if os.path.getsize(tensor.path) < tensor.offset + tensor.n_bytes:
            raise truncated(tensor)
        data: NDArray[Any] = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.n_bytes,))
        if tensor.byte_order == "big":
            layout = tensor.format.layout
            data = data.view(layout.newbyteorder(">")).astype(layout).view(np.uint8)
        plain: NDArray[np.uint8] = data.view(np.ndarray)
        return plain

    def close(self) -> None:
        """Give back the host memory that loading used. Loaded tensors stay."""
        self._staging.clear()

    def _staging_for(self, place: Place) -> Staging:
        from numba_dequant.staging import Staging

        if place.index not in self._staging:
            self._staging[place.index] = Staging(place.index)
        return self._staging[place.index]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Model({self.path!r}, {len(self.tensors)} tensors)"


def _picks(select: Select, tensor: TensorInfo) -> bool:
    if select is None:
        return True
    if callable(select):
        return bool(select(tensor))
    return fnmatch.fnmatchcase(tensor.name, select)


def open(path: str | os.PathLike[str]) -> Model:
    """Open a GGUF model: one file, or the first shard of a split. Reads the header and nothing else.

    Raises:
        GgufError: the file is not a sound GGUF file.
        OSError: it cannot be read.
    """
    return Model(open_gguf(path))


def load(
    path: str | os.PathLike[str],
    select: Select = None,
    dtype: Any = "float16",
    device: str | None = None,
    stream: Any = None,
    progress: bool = False,
) -> dict[str, Any]:
    """`open` and `Model.load_all` in one call."""
    with open(path) as model:
        return model.load_all(select, dtype, device, stream, progress)
