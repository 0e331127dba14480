"""Matrix products that accumulate and leave in float32, and their operands."""

import functools
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
    """Pieces of rows in the products' dtype; the last one is kept.

    rounded_to: what autocast would narrow them to; they keep its values in the wider dtype.
    """

    def __init__(
        self, of: Tensor | HeadRows, dtype: torch.dtype, rounded_to: torch.dtype | None = None
    ):
        self._of, self._dtype, self._rounded_to = of, dtype, rounded_to
        self._rows = self._piece = self._memory = None

    def __getitem__(self, rows: slice) -> Tensor:
        if rows != self._rows:
            self._rows, piece = rows, self._of[rows]
            if self._rounded_to is not None:
                piece = piece.to(self._rounded_to)
            if piece.dtype != self._dtype:
                piece = self._room_for(piece).copy_(piece)
            self._piece = piece
        return self._piece

    def _room_for(self, piece: Tensor) -> Tensor:
        if self._memory is None or len(self._memory) < len(piece):
            self._memory = torch.empty_like(piece, dtype=self._dtype)
        return self._memory[: len(piece)]


class Term:
    """x_NK w_VKᵀ, one term of the logits: hidden states and head, or an adapter's two factors."""

    def __init__(self, x_NK, w_VK: Tensor | HeadRows, grads, dtype, rounded_to):
        self.x_NK, self.w_VK, self.x_grad, self.w_grad = x_NK, w_VK, *grads
        self.x_pieces = Operand(x_NK, dtype, rounded_to)
        self.w_pieces = Operand(w_VK, dtype, rounded_to)


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, accumulated in out's dtype without rounding in between."""
    if a.dtype != out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() and has_onednn():
        onednn_product(a, b, out, accumulate)
    else:
        torch_product(a, b, out, accumulate)


def torch_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)


@functools.cache
def has_onednn() -> bool:
    """Whether float32 products go to oneDNN: it has AVX-512 on all CPUs that do, MKL not.

    But only if a row's sums do not depend on the number of rows, as MKL's do not: tested once, in a
    shape in which oneDNN's do under torch 2.10 and 2.11.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and sums_rows_alike()


def sums_rows_alike() -> bool:
    """Whether oneDNN's product of 512 rows has the bits of that of its first 16."""
    a = torch.arange(512.0 * 896).view(512, 896).sin()
    b = torch.arange(896.0 * 1024).view(896, 1024).cos()
    many, few = torch.empty(512, 1024), torch.empty(16, 1024)
    onednn_product(a, b, many, accumulate=False)
    onednn_product(a[:16], b, few, accumulate=False)
    return torch.equal(many[:16], few)


def onednn_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """As torch_product, in float32, through the operator that torch.compile has for it."""
    linear = torch.ops.mkldnn._linear_pointwise  # takes bᵀ, and has no `out`
    if accumulate:
        out.copy_(linear.binary(a, out, b.T, None, "add"))
    else:
        out.copy_(linear(a, b.T, None, "none", [], ""))
