"""Matrix products that accumulate and leave in float32, and their operands."""

from typing import Protocol

import torch
from torch import Tensor


class HeadRows(Protocol):
    """A head that makes its rows when asked, such as a quantised one: no gradient flows to it."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Those rows, a slice or int64 indices, as a tensor (., D) of `dtype`."""


class Operand:
    """Pieces of rows in the products' dtype, perhaps weighted; the last one is kept."""

    def __init__(self, of: Tensor | HeadRows, dtype: torch.dtype, weight_N: Tensor | None = None):
        self._of, self._dtype, self._weight_N = of, dtype, weight_N
        self._rows = self._piece = self._memory = None

    def __getitem__(self, rows: slice) -> Tensor:
        if rows != self._rows:
            self._rows, piece = rows, self._of[rows]
            if self._weight_N is not None:
                piece = torch.mul(piece, self._weight_N[rows, None], out=self._room_for(piece))
            elif piece.dtype != self._dtype:
                piece = self._room_for(piece).copy_(piece)
            self._piece = piece
        return self._piece

    def _room_for(self, piece: Tensor) -> Tensor:
        if self._memory is None or len(self._memory) < len(piece):
            self._memory = torch.empty_like(piece, dtype=self._dtype)
        return self._memory[: len(piece)]


class Term:
    """x_NK w_VKᵀ, one term of the logits: hidden states and head, or an adapter's two factors."""

    def __init__(self, x_NK, w_VK: Tensor | HeadRows, grads, dtype: torch.dtype, autocast: bool):
        self.x_NK, self.w_VK, self.dtype = x_NK, w_VK, dtype
        self.x, self.w = Operand(x_NK, dtype), Operand(w_VK, dtype)
        self.x_grad, self.w_grad = grads
        self.narrow = autocast or x_NK.dtype == w_VK.dtype == torch.bfloat16


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool, narrow: bool) -> None:
    """out = a @ b, or out += a @ b: accumulated and left in out's dtype, never rounded before.

    narrow: a CPU may round float32 operands to bfloat16, which loses nothing where they came from
    it. With bfloat16 instructions that halves the time, without them nothing changes.
    """
    if a.dtype != out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    matmul = torch.backends.mkldnn.matmul  # a setting of the whole process: for one product only
    before = matmul.fp32_precision
    if narrow:
        matmul.fp32_precision = "bf16"
    try:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    finally:
        if narrow:
            matmul.fp32_precision = before
