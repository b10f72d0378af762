"""Layers whose weights stay compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from numba_dequant.arguments import flag_option, whole_option
from numba_dequant.errors import DataError, DtypeError, ShapeError
from numba_dequant.formats import FORMATS
from numba_dequant.torch.checks import check_tensor
from numba_dequant.torch.functional import dequantize, get_rows, linear, qtype_name, resolved


def _blocks(qtype: str, n_rows: int, n_columns: int, device: Any) -> nn.Parameter:
    """An uninitialized weight.

    Raises:
        ShapeError: a row is not a whole number of blocks, or no memory has so many bytes.
    """
    row_bytes = FORMATS[qtype].n_bytes((1, n_columns))
    if max(n_rows, 1) * row_bytes >= 2**60:
        raise ShapeError(f"a layer of {n_rows} rows of {n_columns} elements is too large; pass smaller numbers")
    return nn.Parameter(torch.empty(n_rows, row_bytes, dtype=torch.uint8, device=device), requires_grad=False)


def _checked_blocks(weight: Tensor, qtype: Any) -> tuple[Tensor, str, int]:
    """A weight as a matrix of uint8, the name of its format, and the number of elements in a row."""
    name = qtype_name(qtype)
    check_tensor("weight", weight)
    if weight.dtype is not torch.uint8 or weight.dim() != 2:
        raise DataError(
            f"weight must be uint8 of shape (rows, bytes per row), got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    return weight.detach(), name, FORMATS[name].n_elements(weight.shape[1])


def _checked_bias(bias: Tensor, n_rows: int) -> Tensor:
    """A bias for a layer.

    Raises:
        DataError: it is no tensor.
        DtypeError: it does not hold floating-point numbers.
        ShapeError: it has not one number for each row.
    """
    check_tensor("bias", bias)
    if not bias.is_floating_point():
        raise DtypeError(f"bias holds {bias.dtype}; pass a tensor of floating-point numbers")
    if tuple(bias.shape) != (n_rows,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}, but weight has {n_rows} rows; pass a number for each")
    return bias


def _checked_dtype(dtype: Any) -> torch.dtype | None:
    """A floating-point dtype, also by its name, or None. Raises DtypeError for others."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    return resolved("F32", dtype)[1]


class QuantizedLinear(nn.Linear):
    """`torch.nn.Linear` with a compressed weight.

    The weight is a parameter of dtype uint8 and shape (out_features, bytes per row) that needs no gradient. It is moved
    between devices, copied and saved like any other; ``.half()`` and ``.to(dtype)`` change only the bias. `linear`
    multiplies the blocks, or dequantizes them in each forward; backward dequantizes them again.

    On a GPU, a forward may begin before the preceding kernel on the stream has ended. That kernel must not write to the
    weight: call ``torch.cuda.synchronize()`` after you change it.

    The type of the blocks is not part of the state dict: load a state dict into a layer of the same `qtype`.

    >>> import torch, numba_dequant.torch
    >>> layer = numba_dequant.torch.QuantizedLinear.from_blocks(torch.zeros(3, 36, dtype=torch.uint8), "Q4_0")
    >>> layer
    QuantizedLinear(in_features=64, out_features=3, bias=False, qtype=Q4_0)
    >>> layer(torch.ones(2, 64)).shape
    torch.Size([2, 3])

    Attributes:
        qtype: the name of the format of the weight.

    Args:
        in_features: elements per row, a whole number of blocks.
        out_features: number of rows.
        qtype: as for `numba_dequant.torch.dequantize`.
        bias: whether there is a bias.
        device: device of the parameters.
        dtype: dtype of the bias.

    Raises:
        UnknownFormatError: there is no such format.
        ShapeError: `in_features` is not a whole number of blocks.
        OptionError: a number of features is not a whole number, or `bias` is not True or False.
        DtypeError: `dtype` is no floating-point type.
    """

    def __init__(
        self, in_features: int, out_features: int, qtype: Any, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        nn.Module.__init__(self)
        in_features = whole_option("in_features", in_features, 0)
        out_features, dtype = whole_option("out_features", out_features, 0), _checked_dtype(dtype)
        self.in_features, self.out_features, self.qtype = in_features, out_features, qtype_name(qtype)
        self.weight = _blocks(self.qtype, out_features, in_features, device)
        self.register_parameter("bias", None)
        if flag_option("bias", bias):
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @classmethod
    def from_blocks(cls, weight: Tensor, qtype: Any, bias: Tensor | None = None) -> QuantizedLinear:
        """A layer for blocks of shape (out_features, bytes per row), which are not copied.

        Raises:
            UnknownFormatError: there is no such format.
            DataError: `weight` is not a matrix of whole blocks, or `bias` is no tensor.
            DtypeError: `bias` does not hold floating-point numbers.
            ShapeError: `bias` has not one number for each row.
        """
        blocks, name, in_features = _checked_blocks(weight, qtype)
        if bias is not None:
            bias = _checked_bias(bias, blocks.shape[0])
        layer = cls(in_features, blocks.shape[0], name, bias=False, device="meta")
        layer.weight = nn.Parameter(blocks, requires_grad=False)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias`` of shape (..., out_features) and the dtype of `input`."""
        return linear(input, self.weight, self.qtype, self.bias, weight_is_constant=True)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A `torch.nn.Linear` with the dequantized weight; `dtype` as in `numba_dequant.torch.dequantize`."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(dequantize(self.weight, self.qtype, dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dense.weight.dtype))
        return dense.train(self.training)

    def reset_parameters(self) -> None:
        """Do nothing: blocks have no random initial values."""

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"{super().extra_repr()}, qtype={self.qtype}"


class QuantizedEmbedding(nn.Embedding):
    """`torch.nn.Embedding` with a compressed weight.

    The weight is a parameter of dtype uint8 and shape (num_embeddings, bytes per row) that needs no gradient. Only the
    rows of a batch are dequantized. The dtype of the result is that of the constructor, until ``.half()`` or
    ``.to(dtype)`` changes it.

    >>> import torch, numba_dequant.torch
    >>> blocks = torch.zeros(100, 36, dtype=torch.uint8)
    >>> layer = numba_dequant.torch.QuantizedEmbedding.from_blocks(blocks, "Q4_0", torch.bfloat16)
    >>> layer(torch.tensor([1, 99])).dtype
    torch.bfloat16

    Attributes:
        qtype: the name of the format of the weight.

    Args:
        num_embeddings: number of rows.
        embedding_dim: elements per row, a whole number of blocks.
        qtype: as for `numba_dequant.torch.dequantize`.
        padding_idx: as in `torch.nn.Embedding`; it has no effect, because the weight gets no gradient.
        device: device of the weight.
        dtype: dtype of the result; None means PyTorch's default dtype.

    Raises:
        UnknownFormatError: there is no such format.
        ShapeError: `embedding_dim` is not a whole number of blocks.
        OptionError: `num_embeddings` or `embedding_dim` is not a whole number.
        DtypeError: `dtype` is no floating-point type.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        qtype: Any,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        embedding_dim = whole_option("embedding_dim", embedding_dim, 0)
        num_embeddings, dtype = whole_option("num_embeddings", num_embeddings, 0), _checked_dtype(dtype)
        self.num_embeddings, self.embedding_dim, self.qtype = num_embeddings, embedding_dim, qtype_name(qtype)
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight = _blocks(self.qtype, num_embeddings, embedding_dim, device)
        # `Module.to` changes its dtype with that of all other buffers.
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_blocks(cls, weight: Tensor, qtype: Any, dtype: torch.dtype | None = None) -> QuantizedEmbedding:
        """A layer for blocks of shape (num_embeddings, bytes per row), which are not copied.

        Raises:
            UnknownFormatError: there is no such format.
            DataError: `weight` is not a matrix of whole blocks.
            DtypeError: `dtype` is no floating-point type.
        """
        blocks, name, embedding_dim = _checked_blocks(weight, qtype)
        layer = cls(0, embedding_dim, name, device=blocks.device, dtype=dtype)
        layer.num_embeddings = blocks.shape[0]
        layer.weight = nn.Parameter(blocks, requires_grad=False)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """The rows with the numbers `input`: shape ``(*input.shape, embedding_dim)``."""
        return get_rows(self.weight, input, self.qtype, self._dtype.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A `torch.nn.Embedding` with the dequantized weight; None means the dtype of the results of this layer."""
        weight = dequantize(self.weight, self.qtype, dtype or self._dtype.dtype)
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        dense.weight = nn.Parameter(weight)
        return dense.train(self.training)

    def reset_parameters(self) -> None:
        """Do nothing: blocks have no random initial values."""

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"{super().extra_repr()}, qtype={self.qtype}, dtype={self._dtype.dtype}"


def keep_blocks(layer: nn.Module, weight: nn.Parameter, qtype: str, dtype: torch.dtype) -> None:
    """Turn a `torch.nn.Linear` into a `QuantizedLinear`, or a `torch.nn.Embedding` into a `QuantizedEmbedding`.

    The module stays the same object, so that hooks and modules that share it need no change.
    """
    if isinstance(layer, nn.Linear):
        layer.__class__ = QuantizedLinear
    else:
        layer.__class__ = QuantizedEmbedding
        layer.register_buffer("_dtype", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)
    layer.qtype = qtype
    layer.weight = weight
