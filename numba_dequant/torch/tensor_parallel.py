"""Styles for `parallelize_module` that divide layers with compressed weights among the ranks of a device mesh."""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor.parallel import ParallelStyle

from numba_dequant.arguments import flag_option, whole_option
from numba_dequant.errors import OptionError, ShapeError
from numba_dequant.formats import FORMATS
from numba_dequant.torch.layers import QuantizedLinear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class QuantizedColwiseParallel(ParallelStyle):
    """Divide the outputs of a `QuantizedLinear`. Each rank keeps some rows of the weight and computes their outputs.

    >>> from torch.distributed.tensor.parallel import parallelize_module
    >>> styles = {"up": QuantizedColwiseParallel(unit=256), "down": QuantizedRowwiseParallel(unit=256)}
    >>> parallelize_module(model, mesh, styles)  # doctest: +SKIP

    Args:
        unit: number of outputs that stay together, such as those of an attention head. The layer that takes the outputs
            needs the same unit, which must be a multiple of the block size of its format.
        gather_output: whether each rank returns all outputs. If False, each rank returns its own outputs. If True, all
            ranks must compute the same loss from them.

    Raises:
        OptionError: an argument is wrong. `parallelize_module` raises it if a layer is not a `QuantizedLinear`, or the
            mesh has more than one dimension.
        ShapeError: `parallelize_module` raises it if there are fewer units than ranks.
    """

    def __init__(self, *, unit: int = 1, gather_output: bool = False) -> None:
        self.unit = whole_option("unit", unit, 1)
        self.gather_output = flag_option("gather_output", gather_output)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _quantized(module)
        start, stop = _range_of(layer.out_features, self.unit, device_mesh, f"{layer.out_features} outputs")
        group = device_mesh.get_group()
        ranges = [_cut(layer.out_features, self.unit, rank, device_mesh.size()) for rank in range(device_mesh.size())]
        layer.weight = nn.Parameter(layer.weight[start:stop].clone(), requires_grad=False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[start:stop].clone(), layer.bias.requires_grad)
        layer.out_features = stop - start
        layer.register_forward_pre_hook(lambda _, inputs: (_GradientsAdded.apply(inputs[0], group), *inputs[1:]))
        if self.gather_output:
            rank = device_mesh.get_local_rank()
            layer.register_forward_hook(lambda _, inputs, output: _Gathered.apply(output, group, ranges, rank))
        return layer


class QuantizedRowwiseParallel(ParallelStyle):
    """Divide the inputs of a `QuantizedLinear`. Each rank keeps some columns of the weight, and the results are added.

    Columns are cut between blocks. The bias is added once, by the first rank. Each rank returns the whole result. The
    results of the ranks are added in the dtype of the outputs.

    Args:
        unit: number of inputs that stay together.
        split_input: whether each rank gets all inputs and takes its part. If False, each rank gets only its part.

    Raises:
        OptionError, ShapeError: as for `QuantizedColwiseParallel`.
    """

    def __init__(self, *, unit: int = 1, split_input: bool = False) -> None:
        self.unit = whole_option("unit", unit, 1)
        self.split_input = flag_option("split_input", split_input)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _quantized(module)
        fmt, group = FORMATS[layer.qtype], device_mesh.get_group()
        unit = lcm(self.unit, fmt.block_size)
        what = f"{layer.in_features} inputs ({fmt.name} has blocks of {fmt.block_size})"
        start, stop = _range_of(layer.in_features, unit, device_mesh, what)
        first, last = (end // fmt.block_size * fmt.type_size for end in (start, stop))
        layer.weight = nn.Parameter(layer.weight[:, first:last].clone(), requires_grad=False)
        if device_mesh.get_local_rank() > 0:
            layer.register_parameter("bias", None)
        whole, layer.in_features = layer.in_features, stop - start

        def split(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if inputs[0].shape[-1] != whole:  # on all ranks, so that none waits for another
                raise ShapeError(f"the input has {inputs[0].shape[-1]} features, but the layer takes {whole}")
            return _GradientsAdded.apply(inputs[0], group)[..., start:stop].contiguous(), *inputs[1:]

        if self.split_input:
            layer.register_forward_pre_hook(split)
        layer.register_forward_hook(lambda _, inputs, output: _Added.apply(output, group))
        return layer


def _quantized(module: nn.Module) -> QuantizedLinear:
    if not isinstance(module, QuantizedLinear):
        raise OptionError(
            f"this style is for a QuantizedLinear, but the layer is a {type(module).__name__}; use a style of PyTorch"
        )
    return module


def _cut(extent: int, unit: int, rank: int, count: int) -> tuple[int, int]:
    """The range of one rank, in whole units. If the ranges cannot be equal, the first ranks have one unit more."""
    each, more = divmod(-(-extent // unit), count)
    start = rank * each + min(rank, more)
    return min(start * unit, extent), min((start + each + (rank < more)) * unit, extent)


def _range_of(extent: int, unit: int, mesh: DeviceMesh, what: str) -> tuple[int, int]:
    if mesh.ndim != 1:
        raise OptionError(f"the mesh has {mesh.ndim} dimensions, not 1; pass one of them, such as mesh['tp']")
    if -(-extent // unit) < mesh.size():
        raise ShapeError(f"{what}, in units of {unit}, are too few for {mesh.size()} ranks; use fewer ranks")
    return _cut(extent, unit, mesh.get_local_rank(), mesh.size())


class _Added(torch.autograd.Function):
    """The sum over all ranks. Each summand gets the gradient of the sum."""

    @staticmethod
    def forward(context: Any, value: Tensor, group: Any) -> Tensor:
        return _sum(value, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _GradientsAdded(torch.autograd.Function):
    """The value, unchanged. In backward, the gradients of all ranks are added, because each is only a part."""

    @staticmethod
    def forward(context: Any, value: Tensor, group: Any) -> Tensor:
        context.group = group
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], context.group), None


class _Gathered(torch.autograd.Function):
    """The outputs of all ranks, side by side. Each rank gets the gradient of its own outputs."""

    @staticmethod
    def forward(context: Any, value: Tensor, group: Any, ranges: list[tuple[int, int]], rank: int) -> Tensor:
        context.range = ranges[rank]
        largest = max(stop - start for start, stop in ranges)
        padded = nn.functional.pad(value, (0, largest - value.shape[-1])).unsqueeze(0).contiguous()
        every = _wait(_gather(padded, 0, group))
        return torch.cat([every[other, ..., : stop - start] for other, (start, stop) in enumerate(ranges)], -1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        start, stop = context.range
        return gradients[0][..., start:stop].contiguous(), None, None, None


_wait: Callable[[Tensor], Tensor] = collectives.wait_tensor
_gather: Callable[[Tensor, int, Any], Tensor] = getattr(collectives, "all_gather_single", None) or (
    collectives.all_gather_tensor  # its name in older versions of PyTorch
)


def _sum(value: Tensor, group: Any) -> Tensor:
    return _wait(collectives.all_reduce(value.contiguous(), "sum", group))
