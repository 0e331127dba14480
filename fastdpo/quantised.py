"""Rows of a quantised head, made when asked: bitsandbytes' 8-bit and 4-bit layers, in torch.

A linear_logps head needs shape, dtype and head[rows]; a tile of it at a time is dequantised. The
layouts are bitsandbytes 0.50's; tests/test_quantised.py compares them with its own dequantisation.
"""

import torch
from torch import Tensor, nn


class Int8Rows:
    """Weights of `Linear8bitLt`: int8 (V, D) times each row's largest value / 127."""

    def __init__(self, weight_VD: Tensor, largest_V: Tensor, dtype: torch.dtype):
        self._weight_VD, self._step_V = weight_VD, largest_V.float() / 127
        self.shape, self.dtype = tuple(weight_VD.shape), dtype

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return (self._weight_VD[rows] * self._step_V[rows, None]).to(self.dtype)


class FourBitRows:
    """Weights of `Linear4bit` (nf4 or fp4): two to a byte, the first in the high bits.

    Each is code[bits] times its block's largest value. ValueError where a block spans rows.
    """

    def __init__(self, packed: Tensor, state, dtype: torch.dtype):
        V, D = self.shape = tuple(state.shape)
        if D % state.blocksize:
            raise ValueError(f"want rows of whole blocks of {state.blocksize}, got rows of {D}")
        self.dtype, self._blocksize = dtype, state.blocksize
        byte, code = torch.arange(256, device=packed.device), state.code.float()
        self._code_256x2 = torch.stack([code[byte >> 4], code[byte & 15]], 1)
        largest = state.absmax
        if state.nested:  # the largest values are quantised too
            outer = state.state2
            largest = outer.code[largest.long()].float()
            largest = largest * outer.absmax.repeat_interleave(outer.blocksize)[: len(largest)]
            largest = largest + state.offset
        self._packed_VH, self._largest_VK = packed.view(V, -1), largest.view(V, -1)  # H = D / 2

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        largest_RK = self._largest_VK[rows].float()
        weight = self._code_256x2[self._packed_VH[rows].int()]
        weight = weight.view(*largest_RK.shape, self._blocksize).mul_(largest_RK[..., None])
        return weight.flatten(1).to(self.dtype)


def forbid_repacking(model: nn.Module) -> None:
    """Let the 4-bit layers of `model` keep their weights as they are on a CPU: a forward that does
    not train would lay them out in a way that has no backward, and that FourBitRows cannot read."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def quantised_rows(layer: nn.Module, dtype: torch.dtype) -> Int8Rows | FourBitRows | None:
    """The rows of a bitsandbytes layer's weight in `dtype`; None where it is not quantised.

    ValueError for integer weights that are laid out in no way known here.
    """
    weight = layer.weight
    state, largest_V = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
    if state is None and weight.is_floating_point():
        return None
    is_repacked = getattr(state, "packing_format_for_cpu", False)
    if state is not None and not is_repacked:
        return FourBitRows(weight.data.view(torch.uint8), state, dtype)  # kept in any dtype
    if largest_V is None:  # moved there by the layer's first forward
        largest_V = getattr(getattr(layer, "state", None), "SCB", None)
    if largest_V is not None and weight.dtype == torch.int8:
        return Int8Rows(weight.data, largest_V, dtype)
    got = f"{type(layer).__name__} with a weight of {weight.dtype}"
    raise ValueError(f"want a head in float, int8 or 4 bits of bitsandbytes, got {got}")
