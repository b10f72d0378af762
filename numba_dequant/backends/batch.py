"""The interface of all backends, and `Batch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, Union

from numpy.typing import NDArray

from numba_dequant.arguments import Job

if TYPE_CHECKING:  # requires the GPU packages
    from numba_dequant.backends.device_tensor import DeviceTensor
    from numba_dequant.backends.matmul import ProductJob

Array = Union[NDArray[Any], "DeviceTensor"]
"""A result: a NumPy array on the CPU, a `DeviceTensor` on a GPU."""

Key = TypeVar("Key")


class Batch(Generic[Key]):
    """Many tensors, ready to be dequantized repeatedly: arguments are checked and memory is allocated.

    Attributes:
        results: name -> result. Each `run` overwrites the values.
    """

    def __init__(self, results: dict[Key, Array], work: Callable[[], object]) -> None:
        self.results = results
        self._work = work

    def run(self) -> dict[Key, Array]:
        """Compute all results. On a GPU this queues one launch per format on the stream.

        The host does not wait for the GPU. Exception: the first run on another stream than that of `prepare_many` waits
        for the copies that `prepare_many` has queued.

        Returns:
            `results`.

        Raises:
            DeviceError: the driver refuses a launch, or there is not enough memory.
        """
        self._work()
        return self.results

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        return f"Batch({len(self)} tensors)"


class Backend(Protocol):
    """The interface of all backends; there is one backend for each kind of device."""

    def dequantize(self, job: Job, stream: Any, mapping: str) -> Any:
        """The result of one job, as `numba_dequant.dequantize` returns it."""

    def prepare(self, jobs: Sequence[Job], stream: Any) -> Batch[Any]:
        """The batch, as `numba_dequant.prepare_many` returns it."""

    def dequantize_many(self, jobs: Sequence[Job], stream: Any) -> dict[Any, Any]:
        """The results, as `numba_dequant.dequantize_many` returns them."""

    def matmul(self, given: ProductJob, stream: Any) -> Any:
        """The product, as `numba_dequant.matmul` returns it."""
