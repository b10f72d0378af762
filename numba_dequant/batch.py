"""Work that has been prepared, to be run as often as you like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")


class Batch(Generic[Key]):
    """Many tensors that have been checked and given their memory: what is left of `dequantize_many` is to compute.

    Attributes:
        results: name -> result, which every `run` fills anew.
    """

    def __init__(self, results: dict[Key, Any], work: Callable[[], object]) -> None:
        self.results = results
        self._work = work

    def run(self) -> dict[Key, Any]:
        """Compute all results, on a GPU by one launch per format, in the order of the stream."""
        self._work()
        return self.results

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        return f"Batch({len(self)} tensors)"
