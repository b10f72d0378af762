"""A target for the loader: chunks and threads of all sizes, and files that change while they are loaded."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import structured
from choices import Choices
from common import check_said, expect, folder, patched
from computing import DTYPES, Scope, expected_values, same_bits

import numba_dequant as nd
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.loading import chunks, files, host_loader

Change = Callable[[Path, bytes], None]


def shorter(path: Path, content: bytes) -> None:
    os.truncate(path, len(content) // 2)


def longer(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(bytes(100))


def gone(path: Path, content: bytes) -> None:
    path.unlink()


def replaced(path: Path, content: bytes) -> None:
    """By another file of the same size, whose tensors have other bytes."""
    other = path.with_suffix(".new")
    other.write_bytes(content[:24] + bytes(255 - byte for byte in content[24:]))
    other.replace(path)


def replaced_by_a_shorter(path: Path, content: bytes) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(content[: len(content) // 2])
    other.replace(path)


def a_folder(path: Path, content: bytes) -> None:
    path.unlink()
    path.mkdir()


def touched(path: Path, content: bytes) -> None:
    os.utime(path, ns=(1, 1))


def header_changed(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 16)


def unreadable(path: Path, content: bytes) -> None:
    path.chmod(0)


def cut_and_restored(path: Path, content: bytes) -> None:
    os.truncate(path, 10)
    path.write_bytes(content)


HARMLESS: list[Change] = [touched, cut_and_restored]
CHANGES: list[Change] = [
    *(shorter, longer, gone, replaced, replaced_by_a_shorter, a_folder, header_changed, unreadable),
    *HARMLESS,
]


@contextlib.contextmanager
def sizes(choices: Choices) -> Iterator[None]:
    """Chunks and gaps of another size."""
    with patched(
        (host_loader, "CHUNK_BYTES", choices.pick([34, 64, 300, 1000, 4096, 1 << 20])),
        (chunks, "MAX_GAP", choices.pick([0, 16, 100, 1 << 16])),
    ):
        yield


class AtRead:
    """Changes the file at the `number`-th read, before it or after it."""

    def __init__(self, number: int, change: Callable[[], None], *, is_before: bool) -> None:
        self.left, self.change, self.is_before = number, change, is_before
        self.read = files.read_into

    def __call__(self, file: Any, data: Any, offset: int) -> int:
        self.left -= 1
        if self.left == 0 and self.is_before:
            self.change()
        count = self.read(file, data, offset)
        if self.left == 0 and not self.is_before:
            self.change()
        return count


def ids_of(formats: list[Any]) -> list[int]:
    return [fmt.ggml_id for fmt in formats]


def written(choices: Choices) -> tuple[structured.File, bytes, Path]:
    """A model of the formats that are in use, as a file."""
    described = structured.valid(choices, ids_of(Scope.formats))
    if choices.one_in(8):
        for number in range(choices.below(40)):
            described.tensors.append(structured.tensor(choices, f"more.{number}", ids_of(Scope.formats)))
    content, path = described.content(), folder() / "load.gguf"
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return described, content, path


def expected_of(content: bytes, tensor: Any, dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """The values of a tensor, from the bytes of the file."""
    raw = np.frombuffer(content, np.uint8)[tensor.offset : tensor.offset + tensor.n_bytes].copy()
    if tensor.byte_order == "big":
        layout = tensor.format.layout
        raw = raw.view(layout.newbyteorder(">")).astype(layout).view(np.uint8)
    return expected_values(raw, tensor.format, dtype).reshape(tensor.shape)


def loads(data: bytes) -> str:
    """The values of a load are those of the file as it was opened, or the load is refused."""
    choices = Choices(data)
    _, content, path = written(choices)
    model = nd.open(bytearray(content) if choices.one_in(8) else path)
    change = choices.pick(CHANGES) if choices.one_in(2) else None
    dtype, device = choices.pick(DTYPES), choices.pick(Scope.devices)
    at = AtRead(choices.between(0, 4), lambda: change(path, content) if change else None, is_before=choices.one_in(2))
    if at.left == 0 and change:
        change(path, content)
    with sizes(choices), patched((files, "read_into", at)), warnings.catch_warnings():
        if change is not None and model.path != "<memory>":
            warnings.simplefilter("ignore", RuntimeWarning)  # the time stamp has changed
        try:
            found = loaded(choices, model, dtype, device, is_safe=change is None)
        except (nd.ReadError, nd.GgufError) as error:
            check_said(error)
            expect(change is not None and model.path != "<memory>", f"refused, but the file is as it was: {error}")
            return "refused"
        except nd.NumbaDequantError as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
    for name, values in found.items():
        tensor = model.tensors[name]
        same_bits(values, expected_of(content, tensor, dtype))
    return "changed" if change else "loaded"


def loaded(choices: Choices, model: nd.Model, dtype: str, device: str, *, is_safe: bool) -> dict[str, Any]:
    """The tensors, loaded in one of the ways; only a file that `is_safe` from changes is mapped."""
    threads, way = choices.pick([None, 1, 1, 2, 3]), choices.below(6)
    names = list(model.tensors)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "threads": threads}
    if way == 0:
        return dict(model.load_all(callback=lambda progress: None, **options))
    if way == 1:
        return dict(model.stream(prefetch=choices.below(4), **options))
    if way == 2:
        return {name: model.load(name, **options) for name in names[:3]}
    if way == 3:
        kept = model.load_all(keep_quantized=True, **options)
        return {name: tensor.dequantize(dtype, device=device) for name, tensor in kept.items()}
    if way == 4:
        is_mapped = choices.one_in(2) and is_safe
        blocks = {name: model.read(name, mmap=is_mapped) for name in names[:3]}
        return {
            name: nd.dequantize(raw, model.tensors[name].format, dtype, shape=model.tensors[name].shape, device=device)
            for name, raw in blocks.items()
        }
    out = {}
    for name in names:
        stored = model.tensors[name].format.stored_dtype
        out[name] = np.full(model.tensors[name].shape, 7, numpy_dtype(dtype) if stored is None else stored)
    found = model.load_all(out=out, **options)
    assert all(found[name] is out[name] for name in names)
    return found


def removed() -> None:
    shutil.rmtree(folder() / "load.gguf", ignore_errors=True)
