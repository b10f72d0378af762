"""A stand-in for the custom node ComfyUI-GGUF: modules with its names, signatures and tensor class, and no package."""

import sys
from types import ModuleType, SimpleNamespace

import torch

NAME = "custom_nodes.ComfyUI-GGUF"


class LyingTensor(torch.Tensor):
    """Blocks whose `shape` is that of the values, as ComfyUI-GGUF's class has it."""

    @staticmethod
    def __new__(cls, data, tensor_type, tensor_shape):
        return data.as_subclass(cls)

    def __init__(self, data, tensor_type, tensor_shape):
        super().__init__()
        self.tensor_type, self.tensor_shape = tensor_type, tensor_shape

    def detach(self):
        return self

    @property
    def shape(self):
        return torch.Size(getattr(self, "tensor_shape", self.size()))


def _dequant_module(known):
    module = ModuleType(f"{NAME}.dequant")

    def dequantize(data, qtype, oshape, dtype=None):
        return "theirs"

    def is_quantized(tensor):
        return tensor is not None and getattr(tensor, "tensor_type", None) not in (None, 0, 1)

    def dequantize_tensor(tensor, dtype=None, dequant_dtype=None):
        if tensor.tensor_type in module.dequantize_functions:
            asked = dtype if dequant_dtype == "target" else dequant_dtype
            return module.dequantize(tensor.data, tensor.tensor_type, tensor.tensor_shape, dtype=asked).to(dtype)
        return "by NumPy"

    vars(module).update(
        dequantize=dequantize,
        is_quantized=is_quantized,
        dequantize_tensor=dequantize_tensor,
        dequantize_functions=dict.fromkeys(known, lambda blocks, block_size, type_size, dtype=None: "theirs"),
    )
    return module


def install(patch, known=(12,)):
    """Put the modules into `sys.modules`, as long as `patch` lasts: dequant, and one that has imported by name."""
    dequant, ops = _dequant_module(known), ModuleType(f"{NAME}.ops")
    ops.dequantize_tensor, ops.dequantize = dequant.dequantize_tensor, dequant.dequantize
    for module in (dequant, ops):
        patch.setitem(sys.modules, module.__name__, module)
    return SimpleNamespace(dequant=dequant, ops=ops)
