"""Records the steps of a `decode` while plain Python runs it."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import LookupTable

MASK = re.compile(r"0x([0-9A-F]{8}(?:[0-9A-F]{8})?)\b")
"""A hexadecimal mask of 4 or 8 bytes; a statement with such a mask works on packed bytes."""


@dataclass(frozen=True)
class PackedBytes:
    """Bytes packed in an integer.

    Attributes:
        count: the number of bytes.
        is_signed: whether the bytes are signed.
    """

    count: int
    is_signed: bool = False

    def text(self, number: int) -> str:
        """The bytes of an integer as text, the lowest first."""
        raw = (number & (1 << 8 * self.count) - 1).to_bytes(self.count, "little")
        return "  ".join(map(str, np.frombuffer(raw, np.int8 if self.is_signed else np.uint8).tolist()))


EIGHT = PackedBytes(8)
RESULTS = {
    "load_8_bytes": EIGHT,
    "spread_bits": EIGHT,
    "negate_bytes": PackedBytes(8, is_signed=True),
    "lookup_nibbles": PackedBytes(8, is_signed=True),
}
"""How the results of primitives are packed."""


def _text(value: Any, packed: PackedBytes | None) -> str:
    if isinstance(value, np.ndarray):
        return "  ".join(f"{item:.6g}" for item in value)
    if isinstance(value, (float, np.floating)):
        return f"{value:.6g}"
    if packed is not None:
        return packed.text(int(value))
    return str(value) if abs(value) < 256 else f"{value} = {value:#x}"


@dataclass(frozen=True)
class Call:
    """A function call in `decode`.

    Attributes:
        label: the name of the function and its arguments.
        value: the result: an integer, a float32, or eight float32.
        packed: how bytes are packed in the result, or None.
    """

    label: str
    value: Any
    packed: PackedBytes | None

    @property
    def shown(self) -> str:
        """The value as text."""
        return _text(self.value, self.packed)


@dataclass(frozen=True)
class Step:
    """An assignment in `decode`, or its return value.

    Attributes:
        name: the variable.
        source: the statement.
        value: an integer, a float32, or eight float32.
        calls: the calls of the statement, in order.
    """

    name: str
    source: str
    value: Any
    calls: tuple[Call, ...] = ()

    @property
    def shown(self) -> str:
        """The value as text; packed bytes are shown one by one."""
        return _text(self.value, self._packed)

    @property
    def _packed(self) -> PackedBytes | None:
        if not isinstance(self.value, (int, np.integer)):
            return None
        if self.calls and self.calls[-1].value is self.value:
            return self.calls[-1].packed
        masks: list[int] = [len(digits) // 2 for digits in MASK.findall(self.source)]
        if abs(int(self.value)) >= 1 << 32 or 8 in masks:
            return EIGHT
        return PackedBytes(max(masks)) if masks else None


def trace_decode(decode: Callable[..., Any], block: NDArray[Any], run: int) -> list[Step]:
    """The assignments of a `decode` for one run of a block, in order, and its return value."""
    tracer = _Tracer(decode)
    before = sys.gettrace()
    sys.settrace(tracer.of_frame)
    try:
        decode(block, 0, run)
    finally:
        sys.settrace(before)
    return tracer.steps


class _Tracer:
    """Records the steps of a `decode`, for `sys.settrace`."""

    def __init__(self, decode: Callable[..., Any]) -> None:
        self.steps: list[Step] = []
        self._code: CodeType = decode.__code__
        self._names = {id(value): name for name, value in decode.__globals__.items() if isinstance(value, LookupTable)}
        self._statements = _statements(decode)
        self._known: dict[str, Any] = {}
        self._calls: list[Call] = []
        self._line = 0

    def of_frame(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code is self._code:
            self._line = frame.f_lineno
            return self._in_decode
        if frame.f_back is not None and frame.f_back.f_code is self._code:
            arguments = [frame.f_locals[name] for name in frame.f_code.co_varnames[: frame.f_code.co_argcount]]
            return self._until_it_returns(frame.f_code.co_name, arguments)
        return None

    def _until_it_returns(self, name: str, arguments: list[Any]) -> Any:
        label = f"{name}({', '.join(map(self._argument, arguments))})"
        packed = RESULTS.get(name)
        if name == "lookup" and arguments[0].items.itemsize > 1:
            packed = PackedBytes(arguments[0].items.itemsize, is_signed=True)

        def within(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "return":
                self._calls.append(Call(label, argument, packed))
            return within

        return within

    def _argument(self, value: Any) -> str:
        if isinstance(value, LookupTable):
            return self._names.get(id(value), "table")
        if isinstance(value, np.ndarray):
            return "block"
        if isinstance(value, (int, np.integer)) and abs(int(value)) >= 1 << 32:
            return "..."  # packed bytes, which an earlier line shows
        return f"{value:.6g}" if isinstance(value, np.floating) else str(value)

    def _in_decode(self, frame: FrameType, event: str, argument: Any) -> Any:
        source = self._statements.get(self._line - self._code.co_firstlineno, "")
        for name, value in frame.f_locals.items():
            if name not in ("block", "at", "run") and self._known.get(name) is not value:
                self._known[name] = value
                self._add(name, source, value)
        self._line = frame.f_lineno
        if event == "return":
            source = self._statements.get(self._line - self._code.co_firstlineno, "").removeprefix("return ")
            if not (self.steps and self.steps[-1].value is argument):
                self._add("value", source, argument)
        return self._in_decode

    def _add(self, name: str, source: str, value: Any) -> None:
        self.steps.append(Step(name, source, value, tuple(self._calls)))
        self._calls.clear()


def _statements(function: Callable[..., Any]) -> dict[int, str]:
    """The statement at each line of a function, by line number from 0; empty without its source."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except OSError:
        return {}
    statements: dict[int, str] = {}
    # Outer statements come first; inner ones overwrite them.
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            lines = text.splitlines()[node.lineno - 1 : max(last, node.lineno)]
            for line in range(node.lineno, max(last, node.lineno) + 1):
                statements[line - 1] = " ".join(" ".join(lines).split())
    return statements
