"""The loops of linear_logps over (rows, vocabulary) tiles of logits, forward and backward.

The forward folds each tile into its rows' online softmax and into u = sum_v p_v c_v w_v. The
backward takes the tile from the cache, or computes it again, for the gradient of the weights.
README.md has the maths.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.fold import FOLDS, RunningSoftmax, label_columns
from fastdpo.kernels.products import HeadRows, Term, product
from fastdpo.kernels.second_product import SECOND_PRODUCTS

# Tiles of logits. The CPU's stay in its cache; for any number of rows they have the same columns.
TILE_ROWS = {"cpu": 512, "cuda": 8192}
TILE_COLUMNS = {"cpu": 1024, "cuda": 4096}
ROW_MULTIPLE = {"cpu": 1, "cuda": 16}  # logits from one row to the next: cuBLAS wants them aligned


class Settings(NamedTuple):
    """What linear_logps was asked for, as its docstring says, and what follows from it."""

    scale: float
    softcap: float | None
    stats: tuple[str, ...]
    head_cache_bytes: int
    skip_below: float
    backend: str
    operand_dtype: torch.dtype  # of the products' operands
    rounded_to: torch.dtype | None  # what autocast makes of them, where that is narrower
    term_grads: tuple[tuple[bool, bool], ...]  # of hidden and head, of down and up
    bias_grad: bool

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32

    @property
    def trained(self) -> bool:
        return self.bias_grad or any(w_grad for _, w_grad in self.term_grads)

    def terms(self, *factors: Tensor | HeadRows) -> list[Term]:
        """The terms of the logits; factors: x and w of each, one after the other."""
        pairs = zip(factors[::2], factors[1::2], self.term_grads, strict=True)
        dtypes = self.operand_dtype, self.rounded_to
        return [Term(x, w, grads, *dtypes) for x, w, grads in pairs]


class Tiles:
    """The (row block, vocabulary tile) pieces of one call, and how p of each is made."""

    def __init__(self, terms: list[Term], bias_V: Tensor | None, labels_N: Tensor, settings):
        device, kind = labels_N.device, labels_N.device.type
        kind = kind if kind in TILE_ROWS else "cuda"
        rows, columns = _tile_shape(kind, len(labels_N), *terms[0].w_VK.shape)
        self._row_multiple = ROW_MULTIPLE[kind]
        self.blocks = even_slices(len(labels_N), rows)
        self.columns = slices(terms[0].w_VK.shape[0], columns)
        self.terms, self.settings, self.labels_N = terms, settings, labels_N
        self.bias_V = None if bias_V is None else bias_V.contiguous()
        self.z = torch.empty(rows * self._stride(columns), dtype=settings.wide, device=device)
        is_wide = settings.operand_dtype == settings.wide
        self.p = self.z if is_wide else torch.empty_like(self.z, dtype=settings.operand_dtype)

    def fold(self, block: slice, columns: slice, rows: RunningSoftmax, memory: Tensor) -> Tensor:
        """Fold one piece into `rows` and return its p, at the beginning of `memory`."""
        p_NT = self._piece(memory, block, columns)
        z_NT = p_NT if self.z.dtype == self.p.dtype else self._piece(self.z, block, columns)
        for k, term in enumerate(self.terms):
            x_NK, w_TK = term.x_pieces[block], term.w_pieces[columns]
            product(x_NK, w_TK.T, z_NT, accumulate=k > 0, alike=True)
        bias_T = None if self.bias_V is None else self.bias_V[columns].to(z_NT.dtype)
        labels_N, scale, softcap = self.labels_N[block], self.settings.scale, self.settings.softcap
        fold = FOLDS[self.settings.backend]
        fold(z_NT, p_NT, bias_T, labels_N, columns.start, rows, scale, softcap)
        return p_NT

    def dlogits(self, p_NT, scale_N, label_N, block: slice, columns: slice) -> Tensor:
        """scale_N p_NT, and label_N in the label's column where it is here."""
        out_NT = self._piece(self.p, block, columns)
        torch.mul(p_NT, scale_N[:, None], out=out_NT)
        width = columns.stop - columns.start
        is_here_N, column_N1 = label_columns(self.labels_N[block], columns.start, width)
        label_N = (label_N * is_here_N).to(out_NT.dtype)
        return out_NT.scatter_add_(1, column_N1, label_N[:, None])  # what p left out, or 0

    def zeros_like_x(self, term: Term) -> Tensor:
        return torch.zeros(term.x_NK.shape, dtype=self.settings.wide, device=self.z.device)

    def new_cache(self) -> Tensor:
        """Memory for the p of as many tiles as head_cache_bytes allows; none without a backward."""
        settings = self.settings
        budget = settings.head_cache_bytes // self.p.element_size() if settings.trained else 0
        all_rows = slice(0, len(self.labels_N))
        most = sum(self.size(all_rows, columns) for columns in self.columns)
        return self.p.new_empty(min(budget, most))

    def few_rows(self, term: Term) -> list[slice]:
        """All rows, in pieces whose float32 copy takes a quarter of a tile's memory."""
        return slices(len(self.labels_N), max(1, len(self.z) // (4 * term.x_NK.shape[1])))

    def size(self, rows: slice, columns: slice) -> int:
        """Logits that one piece's memory has room for."""
        return (rows.stop - rows.start) * self._stride(columns.stop - columns.start)

    def _stride(self, columns: int) -> int:
        return -(-columns // self._row_multiple) * self._row_multiple

    def _piece(self, memory: Tensor, rows: slice, columns: slice) -> Tensor:
        width = columns.stop - columns.start
        piece = memory[: self.size(rows, columns)].view(-1, self._stride(width))
        return piece[:, :width]


def _tile_shape(kind: str, N: int, V: int, D: int) -> tuple[int, int]:
    """Rows and columns of a tile; the rows are shared out evenly.

    On a GPU, fewer rows allow more columns, up to the point where the head's (columns, D) slice,
    which may have to be converted or dequantised, would be larger than the tile of logits.
    """
    rows, columns = -(-N // -(-N // TILE_ROWS[kind])), TILE_COLUMNS[kind]
    if kind == "cuda":
        columns = TILE_ROWS[kind] * columns // max(rows, D)
        columns = max(1, columns // ROW_MULTIPLE[kind]) * ROW_MULTIPLE[kind]
    return rows, min(V, columns)


def slices(total: int, step: int) -> list[slice]:
    """All of `total`, `step` at a time."""
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def even_slices(total: int, most: int) -> list[slice]:
    """As few as hold at most `most` each, as large as one another: none is left with a few rows."""
    count = -(-total // most) if total else 0
    return [slice(i * total // count, (i + 1) * total // count) for i in range(count)]


def walk(tiles: Tiles, rows: RunningSoftmax) -> tuple[list[Tensor | None], dict]:
    """Fold every tile into `rows`. Returns u_NK of each term (None without dx), and the cached p.

    A tile's p is cached under its (column, block) numbers, with the peak that it was made with.
    """
    settings = tiles.settings
    second_product = SECOND_PRODUCTS[settings.backend]
    us = [tiles.zeros_like_x(term) if term.x_grad else None for term in tiles.terms]
    cache, kept = tiles.new_cache(), {}
    for c, columns in enumerate(tiles.columns):
        for r, block in enumerate(tiles.blocks):
            size, block_rows = tiles.size(block, columns), rows.block(block)
            is_cached = size <= len(cache)
            p_NT = tiles.fold(block, columns, block_rows, cache if is_cached else tiles.p)
            if is_cached:
                kept[c, r], cache = (p_NT, block_rows.peak_N.clone()), cache[size:]
            for term, u_NK in zip(tiles.terms, us, strict=True):
                if u_NK is not None:
                    w_TK = term.w_pieces[columns]
                    second_product(p_NT, w_TK, u_NK[block], block_rows, settings.skip_below)
    return us, kept


def weight_gradients(
    tiles: Tiles, dz_N: Tensor, lse_N: Tensor, label_share_N: Tensor, kept: dict
) -> tuple[list[Tensor | None], Tensor | None]:
    """dw_VK = dlogits_NVᵀ x_NK of each term that wants it, and dbias_V in float32.

    dlogits are dz_N p_NV, and -dz_N label_share_N for the label. Empties `kept`.
    """
    settings, wide, device = tiles.settings, lse_N.dtype, lse_N.device
    trained = [_Trained(term, tiles) for term in tiles.terms if term.w_grad]
    label_N = -dz_N * label_share_N
    dbias_V = torch.zeros_like(tiles.bias_V, dtype=wide) if settings.bias_grad else None
    for c, columns in enumerate(tiles.columns):
        for r, block in enumerate(tiles.blocks):
            p_NT, peak_N = kept.pop((c, r), (None, None))
            if p_NT is None:
                fresh = RunningSoftmax.start(block.stop - block.start, wide, device)
                p_NT, peak_N = tiles.fold(block, columns, fresh, tiles.p), fresh.peak_N
            scale_N = (peak_N - lse_N[block]).exp_() * dz_N[block]
            dlogits_NT = tiles.dlogits(p_NT, scale_N, label_N[block], block, columns)
            for weight in trained:
                weight.add(dlogits_NT, block, columns)
            if dbias_V is not None:
                dbias_V[columns] += dlogits_NT.sum(0, dtype=wide)
        for weight in trained:
            weight.finish(columns)
    dws = iter(weight.dw_VK for weight in trained)
    return [next(dws) if term.w_grad else None for term in tiles.terms], dbias_V


class _Trained:
    """The gradient of one term's weight: summed in place, or beside it if that is narrow."""

    def __init__(self, term: Term, tiles: Tiles):
        self._x = term.x_pieces
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
