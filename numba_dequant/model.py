"""`open`, `load` and `Model`: from a GGUF file to arrays."""

from __future__ import annotations

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
from numba_dequant.errors import DeviceError, shown
from numba_dequant.gguf.file import GgufFile, TensorInfo, TensorTable, open_gguf
from numba_dequant.gguf.limits import Limits
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

for _each in (Limits, Progress, QuantizedTensor):
    _each.__module__ = "numba_dequant"  # the public name, so that pickles do not depend on these files
del _each

Callback = Callable[[Progress], object] | None

Out = TypeVar("Out")

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from numba_dequant.loading.small_files import SmallFile
    from numba_dequant.parallel.plan import Plan

    Planner = Plan | Callable[["Model"], Plan]

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
        limits: Limits | None

    # The options of a load that returns values, not blocks.
    class _LoadValues(_Options, total=False):
        keep_quantized: Literal[False]
        rows: slice | None

    class _WalkValues(_Walk, total=False):
        keep_quantized: Literal[False]

    class _OpenValues(_Open, total=False):
        keep_quantized: Literal[False]


class Model:
    """An open GGUF model: one file, or all shards of a split. Only the header has been read.

    Loading fails if the file was replaced or its size has changed since; only an incomplete file may grow. If only its
    time stamp has changed, the header is compared: if it is the same, the file is used, with one warning.

    Attributes:
        metadata: the key-value pairs of the file. Arrays and long strings are read on access;
            ``json.dumps(dict(model.metadata))`` reads all of them.
        tensors: name -> `TensorInfo` (format, shape, offset in the file), in file order.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.metadata: Metadata = file.metadata
        self.tensors: TensorTable = file.tensors

    @property
    def path(self) -> str:
        """The path of the file or of the first shard, as passed to `open`; ``<memory>`` for bytes in memory.

        A relative path is for display only. The files are still found after a change of the working directory.
        """
        return self._file.path

    @property
    def n_bytes(self) -> tuple[int, int]:
        """Bytes of all files up to the end of their last tensors: those that existed at `open`, and all of them.

        Missing shards are not counted.
        """
        return self._file.n_bytes_here, self._file.n_bytes

    @property
    def missing_shards(self) -> tuple[str, ...]:
        """The paths of missing shards; only `allow_truncated` accepts a model with missing shards."""
        return self._file.missing_shards

    @overload
    def load(
        self,
        name: str | TensorInfo,
        dtype: Any = ...,
        *,
        keep_quantized: Literal[True],
        out: Any = ...,
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
        """Load one tensor.

        Args:
            name: name of the tensor, or a `TensorInfo` with that name.
            dtype: as for `numba_dequant.dequantize`.
            device: device that computes and has the result, as for `dequantize`.
            out: array to write to, as for `dequantize`.
            stream: CUDA stream, as for `dequantize`.
            rows: slice of the first dimension. Only the bytes of these rows are read.
            keep_quantized: return the compressed bytes, on the device, as a `QuantizedTensor`. Its data is `out` if
                given. Such an `out` is an array of uint8 with one dimension.
            threads: number of threads that read, 1 or more. The default is the number of cores plus two on the CPU,
                and the number of cores, at most 12, for a GPU.

        Returns:
            A result as from `dequantize`, with the shape of the tensor or of its `rows`; or a `QuantizedTensor`.

        Raises:
            TensorNotFoundError: the file has no such tensor.
            ShapeError: `rows` is not a slice of consecutive rows, or the rows are not whole blocks.
            DtypeError, OutputError, OptionError: another argument is wrong. Nothing has been read.
            GgufError: the file ends before the end of the tensor.
            ReadError: the file cannot be read, or has changed since it was opened.
            DeviceError: `device` or `stream` cannot be used, or there is not enough memory.
        """
        output = output_type(dtype, None, out)
        kept = flag_option("keep_quantized", keep_quantized)
        tensor = slice_rows(tensor_named(self.tensors, name), rows)
        request = request_for(tensor, None if kept else output, out)
        return next(self._results([request], device, stream, threads, None, lambda bytes_done: None))

    @overload
    def load_all(
        self, *, dtype: Any = ..., plan: Planner, keep_quantized: bool = ..., **options: Unpack[_Walk]
    ) -> list[dict[str, Any]]: ...

    @overload
    def load_all(
        self,
        select: Select = ...,
        dtype: Any = ...,
        *,
        keep_quantized: Literal[True],
        out: Mapping[str, Any] | None = ...,
        **options: Unpack[_Walk],
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
        plan: Planner | None = None,
    ) -> Any:
        """Load all tensors, or those that `select` matches.

        >>> first, second = model.load_all(device=["cuda:0", "cuda:1"], plan=plan)         # doctest: +SKIP

        Args:
            select: a name, a glob ("blk.*.weight"), a compiled regular expression, a `TensorInfo`, several of these, a
                function that takes a `TensorInfo` and returns a bool, or None for all tensors.
            dtype: one output type, or globs or compiled expressions with their output types, of which the first match
                is used: ``{"*norm*": "float32", "*": "bfloat16"}``.
            device: as for `load`, or a list of devices if you pass `plan`.
            stream: as for `load`.
            progress: show a progress bar after one second: True, False, or None for only on a terminal and in a
                notebook.
            out: name -> array to write to, for some or all tensors, such as the `state_dict` of a PyTorch module. The
                arrays must not share memory.
            keep_quantized: as for `load`.
            threads: as for `load`. With `plan`, all devices share these threads.
            callback: function that is called with a `Progress`, in this thread, at most ten times a second. An
                exception from it stops the load.
            plan: a `numba_dequant.parallel.Plan`, or a function that takes this model and returns one. It says which
                device holds what: rank 0 is the first device of the list `device`. Data that several devices need is
                read once, and is copied between them compressed; each device reads tensors of less than 1 MiB itself.
                `select`, `out` and `stream` cannot be combined with it.

        Returns:
            name -> result as from `load`, in file order. With `plan`, a list of these: one for each device.

        Raises:
            TensorNotFoundError: a name or a pattern matches no tensor, or `out` has the name of a tensor that is not
                loaded.
            DtypeError: there is no such output type, or no pattern in `dtype` matches a tensor.
            OutputError, OptionError: `out` or another argument is wrong. Nothing has been read.
            GgufError, ReadError, DeviceError: as for `load`. Nothing is returned, but outputs may have changed.
        """
        if plan is not None or isinstance(device, (list, tuple)):
            from numba_dequant.loading import devices

            refused = {"select": select, "out": out, "stream": stream}
            load = devices.load_by_plan(self, device, plan, dtype, keep_quantized, threads, refused)
            parts = load.run(Reporter(load.n_bytes, progress, callback))
            by_device: list[dict[str, Any]] = [{} for _ in device]
            for name, of_devices in parts:
                for found, part in zip(by_device, of_devices, strict=True):
                    if part is not None:
                        found[name] = part
            return by_device
        chosen = plan_requests(self.tensors, select, dtype, out, keep_quantized=keep_quantized)
        return dict(self._named(chosen, device, stream, threads, None, progress, callback))

    @overload
    def stream(
        self,
        *,
        dtype: Any = ...,
        plan: Planner,
        prefetch: int = ...,
        keep_quantized: bool = ...,
        **options: Unpack[_Walk],
    ) -> Iterator[tuple[str, list[Any]]]: ...

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
        plan: Planner | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Iterate over the tensors that `load_all` loads, and read ahead meanwhile.

        The iterator does not keep tensors after returning them, so a model may be larger than the memory. Dropping
        the iterator stops reading.

        >>> for name, tensor in model.stream("blk.*", device="cpu"):                       # doctest: +SKIP
        ...     print(name, tensor.shape)

        `prefetch` is the maximum number of tensors to read ahead, 0 or more. With `plan`, tensors are read in batches,
        of which up to three are in memory; a batch has at most `prefetch` times 64 MiB for each device, where 0 counts
        as 1, or one tensor. All other arguments are as for `load_all`.

        Returns:
            An iterator over (name, result as from `load`), in file order. With `plan`, the second is a list with a part
            for each device, which is None if the device does not hold the tensor.

        Raises:
            NumbaDequantError: as for `load_all`. Errors of arguments are raised before the iterator is returned.
        """
        ahead = whole_option("prefetch", prefetch, 0)
        if plan is not None or isinstance(device, (list, tuple)):
            from numba_dequant.loading import devices

            refused, size = {"select": select, "stream": stream}, min(max(ahead, 1) * devices.STREAM_BYTES, 1 << 60)
            load = devices.load_by_plan(self, device, plan, dtype, keep_quantized, threads, refused, size)
            return load.run(Reporter(load.n_bytes, progress, callback))
        chosen = plan_requests(self.tensors, select, dtype, None, keep_quantized=keep_quantized)
        return self._named(chosen, device, stream, threads, ahead, progress, callback)

    def read(self, name: str | TensorInfo, *, mmap: bool = False) -> NDArray[np.uint8]:
        """Read the compressed bytes of one tensor, in the byte order of this machine.

        Args:
            name: name of the tensor, or a `TensorInfo` with that name.
            mmap: return a read-only memory map of the file. Its pages are read on first access, so use it only for
                files that do not change. If the file becomes shorter, **access ends the process with SIGBUS**. A tensor
                in the other byte order is read into memory anyway.

        Returns:
            A uint8 array of one dimension: a new array, or a read-only map with `mmap`. For a model in memory, it is a
            read-only view, unless the model has the other byte order.

        Raises:
            TensorNotFoundError: the file has no such tensor.
            GgufError: the file ends before the end of the tensor.
            ReadError: the file cannot be read, or has changed since it was opened.
            OptionError: `mmap` is not True or False.
            DeviceError: there is not enough memory.
        """
        tensor = tensor_named(self.tensors, name)
        return map_tensor(tensor) if flag_option("mmap", mmap) else read_tensor(tensor)

    def close(self) -> None:
        """Do nothing, because a model keeps no file open. It exists so that `with` works."""

    def _values(
        self, dtype: Any, device: Any, progress: bool | None, callback: Callback, begun: SmallFile
    ) -> dict[str, Any]:
        """The values of all tensors of a file that is being copied to a GPU."""
        chosen = plan_requests(self.tensors, None, dtype, None, keep_quantized=False)
        return dict(self._named(chosen, device, None, None, None, progress, callback, begun))

    def _named(
        self,
        chosen: list[Request],
        device: Any,
        stream: Any,
        threads: int | None,
        prefetch: int | None,
        progress: bool | None,
        callback: Callback,
        begun: SmallFile | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Names and results, in order. This call checks the arguments; the iterator reads."""
        report = Reporter(sum(request.tensor.n_bytes for request in chosen), progress, callback)
        results = self._results(chosen, device, stream, threads, prefetch, report, begun)

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
        begun: SmallFile | None = None,
    ) -> Generator[Any, None, None]:
        backend = backend_for(device, stream)
        if threads is not None:
            threads = whole_option("threads", threads, 1)
        for request in chosen:
            check_complete(request.tensor)
        if isinstance(backend, HostBackend):
            with compile_lock:  # no fork during the import
                from numba_dequant.loading import host_loader

            return host_loader.load(chosen, backend, threads, prefetch, on_bytes_read)
        from numba_dequant.backends import streams
        from numba_dequant.loading import gpu_loader

        outputs = [request.job.out for request in chosen if request.job.out is not None]
        call = streams.stream_for(stream, backend.gpu, outputs)
        return gpu_loader.load(chosen, call, threads, prefetch, on_bytes_read, begun)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        from html import escape  # only notebooks need it

        rows = display.metadata_rows(self.metadata.shown(display.MAX_ROWS))
        metadata = display.html(("metadata", "value"), rows, len(self.metadata))
        return f"<p>{escape(repr(self))}</p>{metadata}{self.tensors._repr_html_()}"

    def __repr__(self) -> str:
        return f"Model({self.path!r}, {len(self.tensors)} tensors)"


def open(
    source: Any,
    *,
    offset: int = 0,
    allow_truncated: bool = False,
    orig_shapes: bool = False,
    limits: Limits | None = None,
) -> Model:
    """Open a GGUF model, which is one file or a split, and read its header.

    Args:
        source: a path (``~`` is not expanded; for a split, its first shard); the contents of a file, as `bytes` or
            another object with bytes in memory, which is not copied; or all shards of a split, as a list of paths or
            contents in any order. `bytes` without a NUL byte are a path.
        offset: byte position where the GGUF file begins, in the file or in memory.
        allow_truncated: accept a file without all of its tensor data, and a split without its later shards. `tensors`
            also lists tensors whose data is not complete; loading them fails until the file has grown. It does not list
            the tensors of missing shards.
        orig_shapes: restore the original shapes of tensors that ComfyUI-GGUF reshaped, which are in the metadata as
            ``comfy.gguf.orig_shape.NAME``.
        limits: what the header may have at most, as a `Limits`; None means the default limits, which no published
            model reaches.

    Returns:
        A `Model`.

    Raises:
        GgufError: the file is not a valid GGUF file, exceeds a limit, is not the first shard of a split, or a shard is
            missing.
        MissingFileError: the file does not exist.
        ReadError: the file cannot be read.
        OptionError: an argument has a wrong type or value.
        DataError: the contents are not contiguous bytes.
    """
    options: Any = {"offset": offset, "allow_truncated": allow_truncated, "orig_shapes": orig_shapes, "limits": limits}
    return Model(open_gguf(source, **options))


@overload
def load(
    source: Any, *, dtype: Any = ..., plan: Planner, keep_quantized: bool = ..., **options: Unpack[_Open]
) -> list[dict[str, Any]]: ...


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
    plan: Planner | None = None,
    offset: int = 0,
    allow_truncated: bool = False,
    orig_shapes: bool = False,
    limits: Limits | None = None,
) -> Any:
    """Load the tensors of a file: `open` and `Model.load_all` in one call.

    `source`, `offset`, `allow_truncated`, `orig_shapes` and `limits` are as for `open`, all others as for
    `Model.load_all`.

    Returns:
        name -> result, in file order. With `plan`, a list of these: one for each device.

    Raises:
        NumbaDequantError: as for `open` and `Model.load_all`.
    """
    opening: Any = {"offset": offset, "allow_truncated": allow_truncated, "orig_shapes": orig_shapes, "limits": limits}
    options: Any = {"device": device, "out": out, "stream": stream, "keep_quantized": keep_quantized, "plan": plan}
    loads_all = keep_quantized is False and all(each is None for each in (select, out, stream, threads, plan))
    # A process that has loaded a file to a GPU begins to copy the next one before it reads the header.
    if loads_all and "numba_dequant.loading.small_files" in sys.modules:
        from numba_dequant.loading.small_files import copy_of_file

        begun = copy_of_file(source, device)
        if begun is not None:
            try:
                model = open(source, **opening)
                return model._values(dtype, device, progress, callback, begun)
            finally:
                begun.stop()
    model = open(source, **opening)
    return model.load_all(select, dtype, threads=threads, progress=progress, callback=callback, **options)


def release_buffers(device: Any = None) -> None:
    """Free the buffers that loads to a GPU keep for the next load: 64 MiB of pinned memory, and 64 MiB on the GPU.

    Loaded tensors are not affected. The next load allocates new buffers, which takes about 50 ms.

    Args:
        device: a GPU, such as "cuda:1"; None for all GPUs.

    Raises:
        DeviceError: there is no such GPU, or the device is no GPU.
    """
    parsed = None if device is None else parse_device(device)
    if parsed is not None and parsed.kind not in ("cuda", "simulator"):
        raise DeviceError(f"device is {shown(device)}, but only a GPU has such buffers; pass 'cuda:0' or omit device")
    index = None if parsed is None else parsed.index
    if "numba_dequant.loading.gpu_buffers" in sys.modules:
        from numba_dequant.loading import gpu_buffers

        gpu_buffers.release(index)
