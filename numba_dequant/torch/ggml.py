"""The functions of a GGML kernel library, with the names and arguments that other programs use.

`dequantize`, `get_rows`, `mul_mat_vec`, `mul_mat_id`, `GEMV_TYPES` and `MAX_GEMV_ROWS` are those of the kernel
"ggml-org/ggml-quantization", which transformers calls. `ggml_dequantize` is the operator of vLLM, sglang and diffusers.
Blocks are uint8 of shape (..., rows, bytes per row), and `ggml_type` is the number of a format. `get_rows`,
`mul_mat_vec` and `mul_mat_id` take all sizes from the blocks: they do not use `cols` and `out_features`.

Source: transformers 5.24, integrations/gguf/kernels.py and utils.py; vllm-gguf-plugin 0.0.5, ops.py; diffusers 0.42,
quantizers/gguf/utils.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numba_dequant.formats import FORMATS
from numba_dequant.torch import functional
from numba_dequant.torch.checks import check_tensor, shapes_of_experts
from numba_dequant.torch.ops import OPERATORS

GEMV_TYPES = frozenset(fmt.ggml_id for fmt in FORMATS.values() if fmt.block_size > 1)
"""The types that `mul_mat_vec` and `mul_mat_id` accept: all formats of blocks."""

MAX_GEMV_ROWS = 8
"""The number of rows up to which callers use `mul_mat_vec`. It accepts more."""


def dequantize(blocks: Tensor, ggml_type: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The values of `blocks`: shape (rows, cols)."""
    return functional.dequantize(blocks, ggml_type, dtype, (rows, cols))


def get_rows(blocks: Tensor, indices: Tensor, ggml_type: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The values of the rows `indices`: shape ``(*indices.shape, cols)``."""
    return functional.get_rows(blocks, indices, ggml_type, dtype)


def mul_mat_vec(blocks: Tensor, x: Tensor, ggml_type: int, out_features: int) -> Tensor:
    """``x @ weight.T``: shape (..., out_features) and the dtype of `x`, which has the shape (..., in_features)."""
    return functional.linear(x, blocks, ggml_type)


def mul_mat_id(blocks: Tensor, x: Tensor, ids: Tensor, ggml_type: int, out_features: int) -> Tensor:
    """Each row of `x` times the weights of its experts.

    The host does not wait for `ids`. On a GPU of compute capability 8.0 or higher, a kernel multiplies the blocks of
    the chosen experts themselves, for up to 4096 pairs of a row and an expert, if `x` is float16 or bfloat16. Otherwise
    it depends on the number of pairs. If there are not more pairs than experts, the weights of each pair are
    dequantized. If there are more, all rows of `x` are multiplied with each expert. Gradients of `x` are computed.

    Args:
        blocks: shape (experts, out_features, bytes per row).
        x: floating-point tensor of shape (n, in_features), on the device of `blocks`.
        ids: integers of shape (n, k) on the device of `blocks`: the numbers of the experts of each row.
        ggml_type: the number of the format.
        out_features: rows of each expert.

    Returns:
        Tensor of shape (n, k, out_features) and the dtype of `x`.

    Raises:
        UnknownFormatError: there is no such format.
        DtypeError: `x` is not of float16, bfloat16, float32 or float64, or `ids` are not integers.
        ShapeError: `blocks` does not have 3 dimensions, `x` or `ids` does not have 2, `ids` does not have a row for
            each row of `x`, a row of `x` is not as long as a row of an expert, or there is no expert with one of the
            `ids`. On a GPU, such a number is a CUDA error, or its results are 0.
        DataError: a row of `blocks` is not a whole number of blocks, `blocks` or `ids` is on another device than `x`,
            or an argument is no tensor.
        DeviceError: the GPU cannot be used.
    """
    name, _ = functional.resolved(ggml_type, torch.float32)
    check_tensor("x", x)
    check_tensor("ids", ids)
    weight = functional.as_bytes(blocks, "blocks")
    if (x.dim(), weight.dim(), ids.dim()) != (2, 3, 2):  # for tensors on "meta", the operator does not check it
        raise shapes_of_experts(x, weight, ids)
    values: Tensor = OPERATORS.mul_mat_id.default(x, weight, ids, name)
    return values


def ggml_dequantize(W: Tensor, type: int, m: int, n: int, dtype: torch.dtype | None = None) -> Tensor:  # noqa: N803
    """The values of `W`: shape (m, n); the default dtype is float16."""
    return functional.dequantize(W, type, torch.float16 if dtype is None else dtype, (m, n))
