"""The backends on the host: the CPU, the reference, and Numba's CUDA simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import Job, after_writing, allocated, flat_bytes, host_array, host_output, with_tensor_name
from numba_dequant.backends import cpu, reference
from numba_dequant.backends.batch import Backend, Batch
from numba_dequant.backends.devices import DeviceSpec
from numba_dequant.backends.dlpack import shareable
from numba_dequant.backends.matmul import ProductJob, host_argument, multiply
from numba_dequant.backends.overlap import check_apart, memory_of_array
from numba_dequant.errors import DeviceError, NumbaDequantError, OutputError
from numba_dequant.format import Format
from numba_dequant.formats import is_passed_on


class HostBackend(Backend):
    """Computes on all cores. `device` is used in error messages."""

    def __init__(self, device: DeviceSpec) -> None:
        self.device = device

    def dequantize(self, job: Job, stream: Any, mapping: str) -> Any:
        """The result of one job."""
        data, values = self._memory(job)
        self._compute(job, data, values, mapping)
        return self.result(job, values)

    def prepare(self, jobs: Sequence[Job], stream: Any) -> Batch[Any]:
        """A batch, each run of which reads the data again."""
        prepared = []
        for job in jobs:
            try:
                prepared.append((job, *self._memory(job)))
            except NumbaDequantError as error:
                raise with_tensor_name(error, job.name) from error
        written = [memory_of_array(out, job.name, is_out=True) for job, _, out in prepared if job.out is not None]
        if written:
            check_apart([*written, *(memory_of_array(data, job.name, is_out=False) for job, data, _ in prepared)])
        results = {job.name: self.result(job, values) for job, _, values in prepared}
        steps = [partial(self._compute, *arguments, "tile") for arguments in prepared]
        return Batch(results, lambda: [step() for step in steps])

    def dequantize_many(self, jobs: Sequence[Job], stream: Any) -> dict[Any, Any]:
        """The results of many jobs."""
        return self.prepare(jobs, stream).run()

    def matmul(self, given: ProductJob, stream: Any) -> Any:
        """The product; see `numba_dequant.matmul`."""
        x, data = host_argument(given.x, "x"), host_argument(given.weight, "weight")
        bias = None if given.bias is None else host_argument(given.bias, "bias")
        job = given.measure(x.shape, x.dtype.name, data.nbytes, None if bias is None else bias.shape)
        values = self.output(job)
        for name, array in (("x", x), ("weight", data), ("bias", bias)):
            if job.out is not None and array is not None and np.may_share_memory(values, array):
                raise OutputError(f"out shares memory with {name}; pass another array")
        tile = Job(None, given.fmt, "float32")
        try:
            multiply(given, x, flat_bytes(data), bias, values, lambda blocks, out: self.write(blocks, tile, out))
        except MemoryError as error:
            raise DeviceError(f"the CPU is out of memory while multiplying: {error}") from error
        if job.out is not None:
            after_writing(job.out)
        return self.result(job, values)

    def output(self, job: Job) -> NDArray[Any]:
        """The memory to write to: that of `out`, or new memory.

        Raises:
            OutputError: the result cannot be written to `out`.
            DeviceError: there is not enough memory.
        """
        if job.out is not None:
            return host_output(job, self.device)
        dtype = job.result_dtype
        return allocated(lambda: np.empty(job.shape, dtype), job.n_elements * dtype.itemsize, "the result")

    def result(self, job: Job, values: NDArray[Any]) -> Any:
        """The result for the caller. Its values are in `values`, or will be written there later."""
        return shareable(values) if job.out is None else job.out

    def write(
        self, data: NDArray[np.uint8], job: Job, out: NDArray[Any], mapping: str = "tile", n_shares: int | None = None
    ) -> None:
        """Write the values of `data` (whole blocks) to the flat array `out`.

        The work is divided into `n_shares`; None means the fastest number.
        """
        if job.fmt.stored_dtype is not None:
            out[:] = data.view(job.fmt.stored_dtype)
        else:
            assert job.dtype is not None
            self._decode(data, job.fmt, job.dtype, out, mapping, n_shares)

    def _decode(
        self, data: NDArray[np.uint8], fmt: Format, dtype: str, out: NDArray[Any], mapping: str, n_shares: int | None
    ) -> None:
        cpu.dequantize_into(data, fmt, dtype, out, n_shares)

    def _memory(self, job: Job) -> tuple[NDArray[Any], NDArray[Any]]:
        """The data, which may be strided, and the memory for the values."""
        data = host_array(job.data)
        job.measure(data.nbytes)
        values = self.output(job)
        if job.out is not None and np.may_share_memory(values, data):
            raise OutputError("out shares memory with data; pass another array")
        return data, values

    def _compute(self, job: Job, data: NDArray[Any], values: NDArray[Any], mapping: str) -> None:
        try:
            self.write(flat_bytes(data), job, values.reshape(-1), mapping)
        except MemoryError as error:
            raise DeviceError(f"the CPU is out of memory while computing {values.size:,} values: {error}") from error
        if job.out is not None:
            after_writing(job.out)


class ReferenceBackend(HostBackend):
    """Computes with `Format.dequantize`, in NumPy."""

    def _decode(
        self, data: NDArray[np.uint8], fmt: Format, dtype: str, out: NDArray[Any], mapping: str, n_shares: int | None
    ) -> None:
        if is_passed_on(fmt, dtype):
            cpu.pass_on(data, out, 0, out.size)
        else:
            reference.dequantize_into(data, fmt, out)


class SimulatorBackend(HostBackend):
    """Runs the kernel in Numba's CUDA simulator. For products, NumPy multiplies the values that the kernel writes."""

    def matmul(self, given: ProductJob, stream: Any) -> Any:
        """The product. Arguments may be `SimulatedTensor`."""
        from numba_dequant.backends.simulator import SimulatedTensor

        x, weight, bias = (
            array.values if isinstance(array, SimulatedTensor) else array
            for array in (given.x, given.weight, given.bias)
        )
        return super().matmul(replace(given, x=x, weight=weight, bias=bias), stream)

    def _decode(
        self, data: NDArray[np.uint8], fmt: Format, dtype: str, out: NDArray[Any], mapping: str, n_shares: int | None
    ) -> None:
        from numba_dequant.backends import simulator

        simulator.dequantize_into(data, fmt, dtype, out, mapping)

    def result(self, job: Job, values: NDArray[Any]) -> Any:
        """A `SimulatedTensor`, or `out`."""
        from numba_dequant.backends.simulator import SimulatedTensor

        return SimulatedTensor(values) if job.out is None else job.out
