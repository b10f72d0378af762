"""From a GGUF file to arrays: `open`, `load`, and the `Model` between them."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from numba_dequant import display
from numba_dequant.api import backend_for
from numba_dequant.arguments import flag_option, output_type, whole_option
from numba_dequant.backends.batch import Array
from numba_dequant.backends.devices import parse_device
from numba_dequant.backends.host import HostBackend
from numba_dequant.errors import OutputError
from numba_dequant.gguf.file import GgufFile, TensorInfo, TensorTable, open_gguf
from numba_dequant.gguf.metadata import Metadata
from numba_dequant.loading.files import check_complete, map_tensor, read_tensor
from numba_dequant.loading.progress import Progress, Reporter
from numba_dequant.loading.requests import (
    QuantizedTensor,
    Request,
    Select,
    plan_requests,
    request_for,
    slice_rows,
    tensor_named,
)
from numba_dequant.locks import compile_lock

Callback = Callable[[Progress], object] | None

Out = TypeVar("Out")

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        device: Any
        stream: Any
        threads: int | None

    class _Walk(_Options, total=False):
        progress: bool | None
        callback: Callback

    class _Open(_Walk, total=False):
        offset: int
        allow_truncated: bool
        orig_shapes: bool

    # Each with the option that says: values, not blocks.
    class _LoadValues(_Options, total=False):
        keep_quantized: Literal[False]
        rows: slice | None

    class _WalkValues(_Walk, total=False):
        keep_quantized: Literal[False]

    class _OpenValues(_Open, total=False):
        keep_quantized: Literal[False]


class Model:
    """An open GGUF model, one file or all shards of a split; nothing but the header has been read.

    A file that is replaced or changes its size afterwards is refused when a tensor is loaded. Where only its time
    stamp changes, its header is compared: if that is the same, the file is taken, with one warning.

    Attributes:
        metadata: the file's key-value pairs; arrays and long strings are read when they are looked at.
            ``json.dumps(dict(model.metadata))`` reads all of them.
        tensors: name -> `TensorInfo` (format, shape, place in the file), in file order.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.metadata: Metadata = file.metadata
        self.tensors: TensorTable = file.tensors

    @property
    def path(self) -> str:
        """The file, or the first shard, as it was given; ``<memory>`` for bytes in memory.

        A relative path is kept for display only: files are found again after a change of the working directory.
        """
        return self._file.path

    @property
    def n_bytes(self) -> tuple[int, int]:
        """Bytes that the files had when they were opened, and that they have when they are complete."""
        return self._file.n_bytes_here, self._file.n_bytes

    @property
    def missing_shards(self) -> tuple[str, ...]:
        """Shards that were not there, where `allow_truncated` let them be missing."""
        return self._file.missing_shards

    @overload
    def load(
        self,
        name: str | TensorInfo,
        dtype: Any = ...,
        *,
        keep_quantized: Literal[True],
        rows: slice | None = ...,
        **options: Unpack[_Options],
    ) -> QuantizedTensor: ...

    @overload
    def load(self, name: str | TensorInfo, dtype: Any = ..., *, out: Out, **options: Unpack[_LoadValues]) -> Out: ...

    @overload
    def load(
        self, name: str | TensorInfo, dtype: Any = ..., *, out: None = ..., **options: Unpack[_LoadValues]
    ) -> Array: ...

    def load(
        self,
        name: str | TensorInfo,
        dtype: Any = "float16",
        *,
        device: Any = None,
        out: Any = None,
        stream: Any = None,
        rows: slice | None = None,
        keep_quantized: bool = False,
        threads: int | None = None,
    ) -> Any:
        """One tensor, dequantized; what is not said here is as for `numba_dequant.dequantize`.

        Args:
            name: of the tensor; a `TensorInfo` stands for its name.
            dtype: as for `dequantize`.
            device: where to compute, and where the result lies.
            out: array to write to.
            stream: on which to compute (CUDA).
            rows: only these, a slice of the first dimension; only their bytes are read.
            keep_quantized: give the compressed bytes, on the device, as a `QuantizedTensor`.
            threads: that read, 1 or more. Without it: on the CPU, two more than there are cores; for a GPU, as many as
                there are cores, up to 12.

        Raises:
            TensorNotFoundError: the file holds no tensor of that name.
            ShapeError: `rows` is not a slice, or they are not whole blocks.
            DtypeError, OutputError, OptionError: what is wrong with the other arguments. Nothing has been read then.
            GgufError: the file ends before the tensor does.
            ReadError: the file cannot be read, or has changed since.
            DeviceError: there is no such device, or not enough memory.
        """
        output = output_type(dtype, None, out)
        kept = flag_option("keep_quantized", keep_quantized)
        if kept and out is not None:
            raise OutputError("out cannot be combined with keep_quantized=True; drop one of them")
        tensor = slice_rows(tensor_named(self.tensors, name), rows)
        request = request_for(tensor, None if kept else output, out)
        return next(self._results([request], device, stream, threads, None, lambda bytes_done: None))

    @overload
    def load_all(
        self, select: Select = ..., dtype: Any = ..., *, keep_quantized: Literal[True], **options: Unpack[_Walk]
    ) -> dict[str, QuantizedTensor]: ...

    @overload
    def load_all(
        self, select: Select = ..., dtype: Any = ..., *, out: Mapping[str, Any], **options: Unpack[_WalkValues]
    ) -> dict[str, Any]: ...

    @overload
    def load_all(
        self, select: Select = ..., dtype: Any = ..., *, out: None = ..., **options: Unpack[_WalkValues]
    ) -> dict[str, Array]: ...

    def load_all(
        self,
        select: Select = None,
        dtype: Any = "float16",
        *,
        device: Any = None,
        out: Mapping[str, Any] | None = None,
        stream: Any = None,
        keep_quantized: bool = False,
        threads: int | None = None,
        progress: bool | None = None,
        callback: Callback = None,
    ) -> dict[str, Any]:
        """Every tensor, or those that `select` picks, by name and in file order.

        Args:
            select: a name or a pattern of names ("blk.*.weight", as of files), a compiled regular expression, a
                `TensorInfo`, several of these, a function of a `TensorInfo`, or None for all.
            dtype: one for all, or patterns (or compiled expressions) and their types, of which the first that matches
                counts: ``{"*norm*": "float32", "*": "bfloat16"}``.
            device: as for `load`.
            stream: as for `load`.
            progress: a bar for what takes over a second: None for where somebody would see it (on a terminal, in a
                notebook), True for everywhere, False for nowhere.
            out: name -> array to write to, for some tensors or for all, for example the `state_dict` of a PyTorch
                module. No two may share memory.
            keep_quantized: as for `load`.
            threads: as for `load`.
            callback: is called with a `Progress`, in this thread, up to ten times a second. What it raises ends the
                loading.

        Raises:
            TensorNotFoundError: a name or a pattern picks no tensor.
            DtypeError: no pattern of `dtype` matches a tensor.
            OutputError, OptionError: what is wrong with `out` and the other arguments. Nothing has been read then.
            GgufError, ReadError, DeviceError: as for `load`. Nothing that was loaded is kept then.
        """
        chosen = plan_requests(self.tensors, select, dtype, out, keep_quantized=keep_quantized)
        loaded = self._named(chosen, device, stream, threads, None, progress, callback)
        return dict(loaded)

    @overload
    def stream(
        self,
        select: Select = ...,
        dtype: Any = ...,
        *,
        prefetch: int = ...,
        keep_quantized: Literal[True],
        **options: Unpack[_Walk],
    ) -> Iterator[tuple[str, QuantizedTensor]]: ...

    @overload
    def stream(
        self, select: Select = ..., dtype: Any = ..., *, prefetch: int = ..., **options: Unpack[_WalkValues]
    ) -> Iterator[tuple[str, Array]]: ...

    def stream(
        self,
        select: Select = None,
        dtype: Any = "float16",
        *,
        device: Any = None,
        stream: Any = None,
        keep_quantized: bool = False,
        prefetch: int = 2,
        threads: int | None = None,
        progress: bool | None = None,
        callback: Callback = None,
    ) -> Iterator[tuple[str, Any]]:
        """The tensors that `load_all` loads, one after the other, while the next ones are read.

        A tensor is let go as soon as you let go of it: a model larger than the memory can be walked. Dropping the
        iterator stops the reading.

        >>> for name, tensor in model.stream("blk.*", device="cpu"):                       # doctest: +SKIP
        ...     print(name, tensor.shape)

        Args:
            select: as for `load_all`.
            dtype: as for `load_all`.
            device: as for `load_all`.
            stream: as for `load_all`.
            progress: as for `load_all`.
            prefetch: tensors that may be read ahead of the one that you have, 0 or more.
            keep_quantized: as for `load_all`.
            threads: as for `load_all`.
            callback: as for `load_all`.
        """
        chosen = plan_requests(self.tensors, select, dtype, None, keep_quantized=keep_quantized)
        ahead = whole_option("prefetch", prefetch, 0)
        return self._named(chosen, device, stream, threads, ahead, progress, callback)

    def read(self, name: str | TensorInfo, *, mmap: bool = False) -> NDArray[np.uint8]:
        """The compressed bytes of one tensor, in this machine's byte order: read, and yours to keep.

        Of a model in memory it is a read-only view.

        Args:
            name: of the tensor, or its `TensorInfo`.
            mmap: give a read-only map of the file instead, which reads nothing until it is looked at. What the file
                holds at that time is what it shows; if the file has become shorter, **the process ends by SIGBUS**.
                Only for files that nobody changes. Bytes of the other byte order are read all the same.

        Raises:
            TensorNotFoundError: the file holds no tensor of that name.
            GgufError: the file ends before the tensor does.
            ReadError: the file cannot be read, or has changed since it was opened.
            DeviceError: there is not enough memory.
        """
        tensor = tensor_named(self.tensors, name)
        return map_tensor(tensor) if flag_option("mmap", mmap) else read_tensor(tensor)

    def close(self) -> None:
        """Do nothing: a model keeps no file open, and can still be used. It makes `with` work, as for files."""

    def _named(
        self,
        chosen: list[Request],
        device: Any,
        stream: Any,
        threads: int | None,
        prefetch: int | None,
        progress: bool | None,
        callback: Callback,
    ) -> Iterator[tuple[str, Any]]:
        """Names and results, in order; the arguments are checked before the first is asked for."""
        report = Reporter(sum(request.tensor.n_bytes for request in chosen), progress, callback)
        results = self._results(chosen, device, stream, threads, prefetch, report)

        def pairs() -> Iterator[tuple[str, Any]]:
            try:
                for request in chosen:
                    yield request.tensor.name, next(results)
            finally:
                results.close()
                report.close()

        return pairs()

    def _results(
        self,
        chosen: list[Request],
        device: Any,
        stream: Any,
        threads: int | None,
        prefetch: int | None,
        on_bytes_read: Callable[[int], None],
    ) -> Generator[Any, None, None]:
        backend = backend_for(device, stream)
        if threads is not None:
            threads = whole_option("threads", threads, 1)
        for request in chosen:
            check_complete(request.tensor)
        if isinstance(backend, HostBackend):
            with compile_lock:  # a fork waits for the import
                from numba_dequant.loading import host_loader

            return host_loader.load(chosen, backend, threads, prefetch, on_bytes_read)
        from numba_dequant.loading import gpu_loader

        return gpu_loader.load(chosen, backend.gpu, stream, threads, prefetch, on_bytes_read)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        metadata = display.html(("metadata", "value"), display.metadata_rows(self.metadata.shown()))
        tensors = display.html(display.TENSOR_HEAD, display.tensor_rows(self.tensors.values()))
        return f"<p>{html.escape(repr(self))}</p>{metadata}{tensors}"

    def __repr__(self) -> str:
        return f"Model({self.path!r}, {len(self.tensors)} tensors)"


def open(source: Any, *, offset: int = 0, allow_truncated: bool = False, orig_shapes: bool = False) -> Model:
    """Open a GGUF model: one file, or the first shard of a split. Reads the header and nothing else.

    Args:
        source: a path (``~`` is not expanded); the contents of a file, as `bytes` or anything else that holds bytes in
            memory, which is not copied; or all shards of a split as a list of either, in any order and of any name.
            Of `bytes`, those with a NUL byte are contents, as those of a GGUF file are, and others are a path.
        offset: byte at which the GGUF file begins, within the file or the memory.
        allow_truncated: take a file whose download is not complete, if its header is, and a split that lacks later
            shards. Tensors that are not all there are listed, and refused when they are loaded.
        orig_shapes: give tensors the shapes that ``comfy.gguf.orig_shape.NAME`` in the metadata says they had before
            ComfyUI-GGUF reshaped them.

    Raises:
        GgufError: the file is not a sound GGUF file.
        MissingFileError: there is no such file.
        ReadError: the file cannot be read.
        OptionError: an argument is of a wrong kind.
        DataError: the contents are not contiguous bytes.
    """
    return Model(open_gguf(source, offset=offset, allow_truncated=allow_truncated, orig_shapes=orig_shapes))


@overload
def load(
    source: Any, select: Select = ..., dtype: Any = ..., *, keep_quantized: Literal[True], **options: Unpack[_Open]
) -> dict[str, QuantizedTensor]: ...


@overload
def load(
    source: Any, select: Select = ..., dtype: Any = ..., *, out: Mapping[str, Any], **options: Unpack[_OpenValues]
) -> dict[str, Any]: ...


@overload
def load(
    source: Any, select: Select = ..., dtype: Any = ..., *, out: None = ..., **options: Unpack[_OpenValues]
) -> dict[str, Array]: ...


def load(
    source: Any,
    select: Select = None,
    dtype: Any = "float16",
    *,
    device: Any = None,
    out: Mapping[str, Any] | None = None,
    stream: Any = None,
    keep_quantized: bool = False,
    threads: int | None = None,
    progress: bool | None = None,
    callback: Callback = None,
    offset: int = 0,
    allow_truncated: bool = False,
    orig_shapes: bool = False,
) -> dict[str, Any]:
    """The tensors of a file: `open` and `Model.load_all` in one call, with the arguments of both."""
    model = open(source, offset=offset, allow_truncated=allow_truncated, orig_shapes=orig_shapes)
    options: Any = {"device": device, "out": out, "stream": stream, "keep_quantized": keep_quantized}
    loaded: dict[str, Any] = model.load_all(
        select, dtype, threads=threads, progress=progress, callback=callback, **options
    )
    return loaded


def release_buffers(device: Any = None) -> None:
    """Free the memory that loading to a GPU keeps for the next load: 64 MiB of pinned host memory, as much on the GPU.

    Loaded tensors stay. The next load allocates the buffers again, which takes about 50 ms.

    Args:
        device: one GPU, "cuda:1" for example; None for all.

    Raises:
        DeviceError: there is no such GPU.
    """
    index = None if device is None else parse_device(device).index
    if "numba_dequant.loading.gpu_buffers" in sys.modules:
        from numba_dequant.loading import gpu_buffers

        gpu_buffers.release(index)
