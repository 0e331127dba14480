"""Matrix products with float32 results, and the operands that go into them."""

import functools
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

# Elements of a HeadRows to dequantise at a time, which takes a few times their memory: few
# enough for a CPU's cache, enough for a GPU's launches.
MADE_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 21}
CPU_INFO = Path("/proc/cpuinfo")


class HeadRows(Protocol):
    """A head that makes its rows when asked, such as a quantised one: no gradient flows to it."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Those rows, a slice or int64 indices, as a tensor (., D) of `dtype`."""


class Operand:
    """x or w of a term in the products' dtype, a slice of rows at a time; the last one is kept.

    rounded_to: values are rounded to this dtype, as autocast would, and widened again.
    """

    def __init__(
        self,
        source: Tensor | HeadRows,
        dtype: torch.dtype,
        rounded_to: torch.dtype | None,
        device: torch.device,
    ):
        self._source, self._dtype, self._rounded_to = source, dtype, rounded_to
        self._device = device
        self._rows = self._piece = self._memory = None

    def __getitem__(self, rows: slice) -> Tensor:
        if rows != self._rows:
            self._rows, self._piece = rows, self._made(rows)
        return self._piece

    def at(self, rows: Tensor) -> Tensor:
        """The rows of these indices, with the values that the products have."""
        return self._rounded(self._source[rows]).to(self._dtype)

    def _made(self, rows: slice) -> Tensor:
        if isinstance(self._source, Tensor):
            piece = self._rounded(self._source[rows])
            return piece if piece.dtype == self._dtype else self._room_for(len(piece)).copy_(piece)
        made = self._room_for(rows.stop - rows.start)
        step = max(1, MADE_AT_ONCE[self._device.type] // made.shape[1])
        for first in range(0, len(made), step):
            out = made[first : first + step]
            start = rows.start + first
            out.copy_(self._rounded(self._source[start : start + len(out)]))
        return made

    def _rounded(self, piece: Tensor) -> Tensor:
        return piece if self._rounded_to is None else piece.to(self._rounded_to)

    def _room_for(self, count: int) -> Tensor:
        if self._memory is None:  # the first slice is as long as any
            shape = (count, self._source.shape[1])
            self._memory = torch.empty(shape, dtype=self._dtype, device=self._device)
        return self._memory[:count]


class Term:
    """x_NK w_VKᵀ, one term of the logits: hidden states and head, or an adapter's two factors."""

    def __init__(
        self,
        x_NK: Tensor,
        w_VK: Tensor | HeadRows,
        need_grad: tuple[bool, bool],
        dtype: torch.dtype,
        rounded_to: torch.dtype | None,
    ):
        self.x_NK, self.w_VK, self.x_needs_grad, self.w_needs_grad = x_NK, w_VK, *need_grad
        self.x_pieces = Operand(x_NK, dtype, rounded_to, x_NK.device)
        self.w_pieces = Operand(w_VK, dtype, rounded_to, x_NK.device)


def product(
    a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool, batch_invariant: bool = False
) -> None:
    """out = a @ b, or out += a @ b, accumulated in out's dtype without rounding in between.

    batch_invariant: on a CPU, a row's sum does not depend on how many rows there are, from 16 on.
    """
    is_float32_on_cpu = a.dtype == torch.float32 and a.device.type == "cpu"
    if a.dtype != out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif is_float32_on_cpu and a.numel() and use_onednn(batch_invariant):
        onednn_product(a, b, out, accumulate)
    else:
        torch_product(a, b, out, accumulate)


def torch_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """As product, in one dtype."""
    torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)


def use_onednn(batch_invariant: bool) -> bool:
    """Whether a float32 product goes to oneDNN, which uses AVX-512 on every CPU that has it.

    MKL does so on Intel's alone, and is faster there; but with several threads it sums a row in
    another order where there are few.
    """
    if has_fast_mkl() and not (batch_invariant and torch.get_num_threads() > 1):
        return False
    return has_good_onednn()


@functools.cache
def has_good_onednn() -> bool:
    """Whether torch has oneDNN, the CPU has AVX-512, and products of both are batch-invariant.

    The last is tried once, in a shape in which those of torch 2.10 and 2.11 are not.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and is_onednn_batch_invariant()


@functools.cache
def has_fast_mkl() -> bool:
    """Whether torch has MKL, and an Intel CPU for it: on others MKL keeps to older instructions."""
    return torch.backends.mkl.is_available() and "GenuineIntel" in CPU_INFO.read_text()


def is_onednn_batch_invariant() -> bool:
    """Whether oneDNN's product of 512 rows has the bits of that of its first 16."""
    kind = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    a = torch.arange(512 * 896, **kind).view(512, 896).sin()
    b = torch.arange(896 * 1024, **kind).view(896, 1024).cos()
    many, few = torch.empty(512, 1024, **kind), torch.empty(16, 1024, **kind)
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
