"""The walk of linear_logps over the vocabulary, a tile of logits at a time, and back again.

Forward, every tile is taken into what is known of its rows and into u = sum_v p_v c_v w_v; back,
it is made again, or was kept, for the gradient of the weights. README.md has the maths.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.fold import FOLDS, RunningSoftmax
from fastdpo.kernels.products import HeadRows, Term, product
from fastdpo.kernels.second_product import SECOND_PRODUCTS

# Tiles of logits. The CPU's stay in its cache; for any number of rows they have the same columns.
TILE_ROWS = {"cpu": 512, "cuda": 8192}
TILE_COLUMNS = {"cpu": 1024, "cuda": 4096}


class Settings(NamedTuple):
    """What linear_logps was asked for, as its docstring says, and what follows from it."""

    scale: float
    softcap: float | None
    stats: tuple[str, ...]
    head_cache_bytes: int
    skip_below: float
    fold: str
    operand_dtype: torch.dtype  # of the products' operands
    rounded_to: torch.dtype | None  # what autocast makes of them, where that is narrower
    term_grads: tuple[tuple[bool, bool], ...]  # of hidden and head, of down and up
    bias_grad: bool

    @property
    def wide(self) -> torch.dtype:
        """Of logits and sums."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32

    @property
    def trained(self) -> bool:
        return self.bias_grad or any(w_grad for _, w_grad in self.term_grads)

    def terms(self, *factors: Tensor | HeadRows) -> list[Term]:
        pairs = zip(factors[::2], factors[1::2], self.term_grads, strict=True)
        dtypes = self.operand_dtype, self.rounded_to
        return [Term(x, w, grads, *dtypes) for x, w, grads in pairs]


class Tiles:
    """The (row block, vocabulary tile) pieces of one call, and how p of each is made."""

    def __init__(self, terms: list[Term], bias_V: Tensor | None, labels_N: Tensor, settings):
        device, N, V = labels_N.device, len(labels_N), terms[0].w_VK.shape[0]
        rows, columns = _tile_shape(device, N, V)
        self.blocks, self.columns = slices(N, rows), slices(V, columns)
        self.terms, self.settings, self.labels_N, self.bias_V = terms, settings, labels_N, bias_V
        self.z = torch.empty(rows * columns, dtype=settings.wide, device=device)
        self.p, dtype = self.z, settings.operand_dtype
        if dtype != settings.wide:
            self.p = torch.empty_like(self.z, dtype=dtype)

    def fold(self, block: slice, columns: slice, rows: RunningSoftmax, memory: Tensor) -> Tensor:
        """Take one piece into `rows` and return its p, at the beginning of `memory`."""
        p_NT = _view(memory, block, columns)
        z_NT = p_NT if self.z.dtype == self.p.dtype else _view(self.z, block, columns)
        for k, term in enumerate(self.terms):
            product(term.x_pieces[block], term.w_pieces[columns].T, z_NT, accumulate=k > 0)
        bias_T = None if self.bias_V is None else self.bias_V[columns].to(z_NT.dtype)
        labels_N, scale, softcap = self.labels_N[block], self.settings.scale, self.settings.softcap
        FOLDS[self.settings.fold](z_NT, p_NT, bias_T, labels_N, columns.start, rows, scale, softcap)
        return p_NT

    def dlogits(self, p_NT, log_rescale_N, block: slice, columns: slice, c_target_N) -> Tensor:
        """p brought from its tile's peak to lse, less c in the label's column where it is here."""
        out_NT = _view(self.p, block, columns)
        torch.mul(p_NT, log_rescale_N.exp()[:, None], out=out_NT)
        column_N = self.labels_N[block] - columns.start
        is_here_N = (column_N >= 0) & (column_N < out_NT.shape[1])
        onehot_N = -(c_target_N[block] * is_here_N).to(out_NT.dtype)
        column_N = column_N.clamp(0, out_NT.shape[1] - 1)
        return out_NT.scatter_add_(1, column_N[:, None], onehot_N[:, None])

    def few_rows(self, term: Term) -> list[slice]:
        """All rows, in pieces whose float32 copy takes a quarter of a tile's memory."""
        return slices(len(self.labels_N), max(1, len(self.z) // (4 * term.x_NK.shape[1])))


def _tile_shape(device: torch.device, N: int, V: int) -> tuple[int, int]:
    """Rows and columns of a tile: all with as many rows; on a GPU the fewer, the more columns."""
    kind = device.type if device.type in TILE_ROWS else "cuda"
    rows, columns = -(-N // -(-N // TILE_ROWS[kind])), TILE_COLUMNS[kind]
    if kind == "cuda":
        columns *= TILE_ROWS[kind] // rows
    return rows, min(V, columns)


def slices(total: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def _view(memory: Tensor, block: slice, columns: slice) -> Tensor:
    shape = (block.stop - block.start, columns.stop - columns.start)
    return memory[: shape[0] * shape[1]].view(shape)


def walk(tiles: Tiles, rows: RunningSoftmax) -> tuple[list[Tensor | None], dict]:
    """Take every tile into `rows`; u_NK of each term (None without dx), and the p that fit.

    A piece of p is kept under (block, columns) by number, with the peak that it was made with.
    """
    settings, p, us, kept = tiles.settings, tiles.p, [], {}
    second_product = SECOND_PRODUCTS[settings.fold]
    for term in tiles.terms:
        us.append(torch.zeros_like(term.x_NK, dtype=settings.wide) if term.x_grad else None)
    budget = settings.head_cache_bytes // p.element_size() if settings.trained else 0
    num_logits = len(tiles.labels_N) * tiles.terms[0].w_VK.shape[0]
    room = torch.empty(min(budget, num_logits), dtype=p.dtype, device=p.device)
    for c, columns in enumerate(tiles.columns):
        for r, block in enumerate(tiles.blocks):
            size = (block.stop - block.start) * (columns.stop - columns.start)
            keep, at = size <= len(room), rows.block(block)
            p_NT = tiles.fold(block, columns, at, room if keep else p)
            if keep:
                kept[r, c], room = (p_NT, at.peak_N.clone()), room[size:]
            for term, u_NK in zip(tiles.terms, us, strict=True):
                if u_NK is not None:
                    w_TK = term.w_pieces[columns]
                    second_product(p_NT, w_TK, u_NK[block], at, settings.skip_below)
    return us, kept


def weight_gradients(
    tiles: Tiles, dz_N: Tensor, lse_N: Tensor, c_target_N: Tensor, kept: dict
) -> tuple[list[Tensor | None], Tensor | None]:
    """dw_VK = (p - onehot)ᵀ (dz_N * x_NK) of each term that wants it, and dbias_V in float32."""
    settings, wide, device = tiles.settings, lse_N.dtype, lse_N.device
    trained = [_Trained(term, dz_N, tiles) for term in tiles.terms if term.w_grad]
    dbias_V = torch.zeros_like(tiles.bias_V, dtype=wide) if settings.bias_grad else None
    for c, columns in enumerate(tiles.columns):
        for r, block in enumerate(tiles.blocks):
            p_NT, peak_N = kept.get((r, c), (None, None))
            if p_NT is None:
                fresh = RunningSoftmax.start(block.stop - block.start, wide, device)
                p_NT, peak_N = tiles.fold(block, columns, fresh, tiles.p), fresh.peak_N
            dlogits_NT = tiles.dlogits(p_NT, peak_N - lse_N[block], block, columns, c_target_N)
            for weight in trained:
                weight.add(dlogits_NT, block, columns)
            if dbias_V is not None:
                dbias_V[columns].addmv_(dlogits_NT.T.to(wide), dz_N[block])
        for weight in trained:
            weight.finish(columns)
    dws = iter(weight.dw_VK for weight in trained)
    return [next(dws) if term.w_grad else None for term in tiles.terms], dbias_V


class _Trained:
    """The gradient of one term's weight: summed in place, or beside it if that is narrow."""

    def __init__(self, term: Term, dz_N: Tensor, tiles: Tiles):
        self._x = term.weighted_x(dz_N)
        self.dw_VK, self._sum_TK, wide = torch.empty_like(term.w_VK), None, tiles.settings.wide
        if self.dw_VK.dtype != wide:
            self._sum_TK = torch.empty_like(self.dw_VK[tiles.columns[0]], dtype=wide)

    def _sum(self, columns: slice) -> Tensor:
        is_wide = self._sum_TK is None
        return self.dw_VK[columns] if is_wide else self._sum_TK[: columns.stop - columns.start]

    def add(self, dlogits_NT: Tensor, block: slice, columns: slice) -> None:
        a, b, out = dlogits_NT.T, self._x[block], self._sum(columns)
        product(a, b, out, accumulate=block.start > 0)

    def finish(self, columns: slice) -> None:
        if self._sum_TK is not None:
            self.dw_VK[columns] = self._sum(columns)
