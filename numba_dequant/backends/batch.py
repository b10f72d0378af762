"""What every backend does, and the batch that it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, Union

from numpy.typing import NDArray

from numba_dequant.arguments import Job

if TYPE_CHECKING:  # it imports what only a GPU needs
    from numba_dequant.backends.device_tensor import DeviceTensor

Array = Union[NDArray[Any], "DeviceTensor"]
"""What comes back: a NumPy array from the CPU, a `DeviceTensor` from a GPU."""

Key = TypeVar("Key")


class Batch(Generic[Key]):
    """Many tensors that have been checked and given their memory: what is left of `dequantize_many` is to compute.

    Attributes:
        results: name -> result, which every `run` fills again.
    """

    def __init__(self, results: dict[Key, Array], work: Callable[[], object]) -> None:
        self.results = results
        self._work = work

    def run(self) -> dict[Key, Array]:
        """Compute all results, on a GPU by one launch per format, in the order of the stream."""
        self._work()
        return self.results

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        return f"Batch({len(self)} tensors)"


class Backend(Protocol):
    """A way to compute: one for each kind of device."""

    def dequantize(self, job: Job, stream: Any, mapping: str) -> Any:
        """The result of one job, as `numba_dequant.dequantize` returns it."""

    def prepare(self, jobs: Sequence[Job], stream: Any) -> Batch[Any]:
        """All of `numba_dequant.dequantize_many` but the computation."""
