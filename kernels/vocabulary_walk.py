"""The loops of linear_logps over tiles of logits, a block of rows by some of the vocabulary.

The forward folds each tile into its rows' online softmax and into u = sum_v p_v c_v w_v. The
backward takes the p of a tile from where it was kept, or computes it again, for the gradient of the
weights. README.md has the maths, and the letters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.dlogits import DLOGITS
from fastdpo.kernels.fold import FOLDS, RunningSoftmax
from fastdpo.kernels.products import HeadRows, Term, product
from fastdpo.kernels.second_product import SECOND_PRODUCTS

# Tiles of logits. The CPU's stay in its cache; for any number of rows they have the same columns.
TILE_ROWS = {"cpu": 512, "cuda": 8192}
TILE_COLUMNS = {"cpu": 1024, "cuda": 4096}
LEAST_ROWS = 1024  # of a GPU's tile that is to fit the memory of a gradient
# Rows of a tile start at multiples of this. cuBLAS wants them aligned; and on a CPU exp2 may round
# elements left over from whole vectors differently: these are then the same columns in every row.
ROW_MULTIPLE = 16


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
    terms_need_grad: tuple[tuple[bool, bool], ...]  # (hidden, head) and (down, up)
    bias_needs_grad: bool

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32

    @property
    def trained(self) -> bool:
        return self.bias_needs_grad or any(w_needs for _, w_needs in self.terms_need_grad)

    def terms(self, *factors: Tensor | HeadRows) -> list[Term]:
        """The terms of the logits; factors: x and w of each, one after the other."""
        pairs = zip(factors[::2], factors[1::2], self.terms_need_grad, strict=True)
        dtypes = self.operand_dtype, self.rounded_to
        return [Term(x, w, need_grad, *dtypes) for x, w, need_grad in pairs]


class Tiles:
    """The tiles of one call, each a block of rows by some columns, and how p of one is made."""

    def __init__(
        self, terms: list[Term], bias_V: Tensor | None, labels_N: Tensor, settings: Settings
    ):
        device, kind = labels_N.device, labels_N.device.type
        kind = kind if kind in TILE_ROWS else "cuda"
        room = _rows_with_room(terms, settings.operand_dtype)
        most_rows, width = tile_shape(kind, len(labels_N), *terms[0].w_VK.shape, room)
        self.blocks = even_slices(len(labels_N), most_rows)
        self.columns = slices(terms[0].w_VK.shape[0], width)
        self.terms, self.settings, self.labels_N = terms, settings, labels_N
        self.bias_V = None if bias_V is None else bias_V.contiguous()
        # of one tile each; one memory for both where their dtypes are one
        size, dtype = most_rows * self._stride(width), settings.operand_dtype
        self.z_memory = torch.empty(size, dtype=settings.wide, device=device)
        is_wide = dtype == settings.wide
        self.p_memory = self.z_memory if is_wide else torch.empty_like(self.z_memory, dtype=dtype)

    def fold(
        self, block: slice, columns: slice, softmax: RunningSoftmax, memory: Tensor | None
    ) -> Tensor | None:
        """Fold one tile into its rows' `softmax`; returns p, at the beginning of `memory`."""
        p_NT = None if memory is None else self._tile(memory, block, columns)
        is_wide = p_NT is not None and p_NT.dtype == self.z_memory.dtype
        z_NT = p_NT if is_wide else self._tile(self.z_memory, block, columns)
        for k, term in enumerate(self.terms):
            x_NK, w_TK = term.x_pieces[block], term.w_pieces[columns]
            product(x_NK, w_TK.T, z_NT, accumulate=k > 0, batch_invariant=True)
        bias_T = None if self.bias_V is None else self.bias_V[columns].to(z_NT.dtype)
        labels_N, scale, softcap = self.labels_N[block], self.settings.scale, self.settings.softcap
        fold = FOLDS[self.settings.backend]
        fold(z_NT, p_NT, bias_T, labels_N, columns.start, softmax, scale, softcap)
        return p_NT

    def dlogits(
        self, p_NT: Tensor, row_scale_N: Tensor, dlabel_N: Tensor, block: slice, columns: slice
    ) -> Tensor:
        """row_scale_N p_NT, and dlabel_N in the column of each row's label where it is here."""
        out_NT = self._tile(self.p_memory, block, columns)
        labels_N = self.labels_N[block]
        DLOGITS[self.settings.backend](p_NT, out_NT, row_scale_N, dlabel_N, labels_N, columns.start)
        return out_NT

    def row_chunks(self, term: Term) -> list[slice]:
        """All rows, in chunks whose float32 copy takes a quarter of a tile's memory."""
        return slices(len(self.labels_N), max(1, len(self.z_memory) // (4 * term.x_NK.shape[1])))

    def size(self, block: slice, columns: slice) -> int:
        """Elements of the memory of one tile's p."""
        return (block.stop - block.start) * self._stride(columns.stop - columns.start)

    def _stride(self, columns: int) -> int:
        return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE

    def _tile(self, memory: Tensor, block: slice, columns: slice) -> Tensor:
        width = columns.stop - columns.start
        tile = memory[: self.size(block, columns)].view(-1, self._stride(width))
        return tile[:, :width]


def _rows_with_room(terms: list[Term], p_dtype: torch.dtype) -> int:
    """How many rows' p the memory of the first trained weight's gradient has room for."""
    trained = next((term.w_VK for term in terms if term.w_needs_grad), None)
    return 0 if trained is None else trained.shape[1] * trained.itemsize // p_dtype.itemsize


def tile_shape(kind: str, N: int, V: int, D: int, room: int) -> tuple[int, int]:
    """Rows and columns of a tile; the rows are shared out evenly.

    On a GPU, no more rows than there is `room` for where the p of a trained head may be kept, if
    that is not too few. Fewer rows allow more columns, up to the point where the head's (columns,
    D) slice, which may have to be converted or dequantised, would be larger than the tile of
    logits.
    """
    rows, columns = TILE_ROWS[kind], TILE_COLUMNS[kind]
    if kind == "cuda" and LEAST_ROWS <= room < rows:
        rows = room
    rows = -(-N // -(-N // rows))
    if kind == "cuda":
        columns = TILE_ROWS[kind] * columns // max(rows, D)
        columns = max(1, columns // ROW_MULTIPLE) * ROW_MULTIPLE
    return rows, min(V, columns)


def slices(total: int, step: int) -> list[slice]:
    """All of `total`, `step` at a time."""
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def even_slices(total: int, most: int) -> list[slice]:
    """The fewest slices of at most `most`, as equal as can be: none is left with a few rows."""
    count = -(-total // most)
    return [slice(i * total // count, (i + 1) * total // count) for i in range(count)]


class KeptTiles:
    """The p of tiles from the forward, for the weights' gradients; of as many as find room.

    Room is first in the memory of a gradient itself: the rows of a tile's columns are written only
    after the p of all their tiles was read. The rest share head_cache_bytes. A tile is known by
    where its block and its columns start.
    """

    def __init__(self, tiles: Tiles):
        self._gradients = _new_gradients(tiles)
        self._rooms = self._find_rooms(tiles) if tiles.settings.trained else {}
        self._kept = {}

    def _find_rooms(self, tiles: Tiles) -> dict[tuple[int, int], Tensor]:
        rooms, elsewhere = {}, {}
        for columns in tiles.columns:
            free = self._memory_of_gradient(columns, tiles.p_memory.dtype)
            for block in tiles.blocks:
                tile, size = (block.start, columns.start), tiles.size(block, columns)
                if size <= len(free):
                    rooms[tile], free = free[:size], free[size:]
                else:
                    elsewhere[tile] = size
        budget = tiles.settings.head_cache_bytes // tiles.p_memory.element_size()
        free = tiles.p_memory.new_empty(min(budget, sum(elsewhere.values())))
        for tile, size in elsewhere.items():
            if size <= len(free):
                rooms[tile], free = free[:size], free[size:]
        return rooms

    def _memory_of_gradient(self, columns: slice, dtype: torch.dtype) -> Tensor:
        """The rows of these columns in the first gradient, as flat memory of `dtype`."""
        if not self._gradients or not self._gradients[0].is_contiguous():
            return torch.empty(0, dtype=dtype)
        memory = self._gradients[0][columns].view(-1)
        whole = memory.nbytes // dtype.itemsize * dtype.itemsize
        return memory[: whole // memory.element_size()].view(dtype)

    def take_room(self, block: slice, columns: slice) -> Tensor | None:
        """Memory for the p of a tile, handed out once; None if there is none."""
        return self._rooms.pop((block.start, columns.start), None)

    def keep(self, block: slice, columns: slice, p_NT: Tensor, peak_N: Tensor) -> None:
        """Keep p and a copy of the peaks that it was made with."""
        self._kept[block.start, columns.start] = p_NT, peak_N.clone()

    def take(self, block: slice, columns: slice) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What was kept of a tile, once."""
        return self._kept.pop((block.start, columns.start), (None, None))

    def take_gradients(self, tiles: Tiles) -> list[Tensor]:
        """Memory for each trained weight's gradient: the forward's, or new in a second backward."""
        taken, self._gradients = self._gradients, None
        return _new_gradients(tiles) if taken is None else taken


def _new_gradients(tiles: Tiles) -> list[Tensor]:
    return [torch.empty_like(term.w_VK) for term in tiles.terms if term.w_needs_grad]


def walk(tiles: Tiles, softmax: RunningSoftmax, kept: KeptTiles) -> list[Tensor | None]:
    """Fold every tile into `softmax`. Returns u_NK of each term, None where x needs no gradient."""
    settings = tiles.settings
    second_product = SECOND_PRODUCTS[settings.backend]
    wide = {"dtype": settings.wide, "device": tiles.z_memory.device}
    u_of_terms = [
        torch.zeros(term.x_NK.shape, **wide) if term.x_needs_grad else None for term in tiles.terms
    ]
    is_p_read = any(u_NK is not None for u_NK in u_of_terms)
    blocks = [(block, softmax.block(block)) for block in tiles.blocks]
    for columns in tiles.columns:
        for block, of_block in blocks:
            room = kept.take_room(block, columns)
            memory = tiles.p_memory if room is None and is_p_read else room
            p_NT = tiles.fold(block, columns, of_block, memory)
            if room is not None:
                kept.keep(block, columns, p_NT, of_block.peak_N)
            for term, u_NK in zip(tiles.terms, u_of_terms, strict=True):
                if u_NK is not None:
                    w_TK = term.w_pieces[columns]
                    second_product(p_NT, w_TK, u_NK[block], of_block, settings.skip_below)
    return u_of_terms


def weight_gradients(
    tiles: Tiles,
    dz_N: Tensor,
    peak_N: Tensor,
    log_total_N: Tensor,
    label_share_N: Tensor,
    kept: KeptTiles,
) -> tuple[list[Tensor | None], Tensor | None]:
    """dw_VK = dlogits_NVᵀ x_NK of each term that wants it, and dbias_V in float32.

    dlogits are dz_N p_NV, and -dz_N label_share_N for the label; lse = peak_N + log_total_N.
    """
    settings, wide, device = tiles.settings, peak_N.dtype, peak_N.device
    trained = [term for term in tiles.terms if term.w_needs_grad]
    dws = kept.take_gradients(tiles)
    weights = [_WeightGradient(*each, tiles) for each in zip(trained, dws, strict=True)]
    dlabel_N = -dz_N * label_share_N
    dbias_V = torch.zeros_like(tiles.bias_V, dtype=wide) if settings.bias_needs_grad else None
    for columns in tiles.columns:
        for block in tiles.blocks:
            p_NT, tile_peak_N = kept.take(block, columns)
            if p_NT is None:
                fresh = RunningSoftmax.start(block.stop - block.start, wide, device)
                p_NT, tile_peak_N = tiles.fold(block, columns, fresh, tiles.p_memory), fresh.peak_N
            # the peaks first: lse has the rounding of a logit
            row_scale_N = (tile_peak_N - peak_N[block] - log_total_N[block]).exp_() * dz_N[block]
            dlogits_NT = tiles.dlogits(p_NT, row_scale_N, dlabel_N[block], block, columns)
            for weight in weights:
                weight.add(dlogits_NT, block, columns)
            if dbias_V is not None:
                dbias_V[columns] += dlogits_NT.sum(0, dtype=wide)
        for weight in weights:
            weight.finish(columns)
    made = iter(dws)
    return [next(made) if term.w_needs_grad else None for term in tiles.terms], dbias_V


class _WeightGradient:
    """Sums up one term's dw_VK: in its memory, or in float32 beside it.

    Beside it where that is narrower, or may still hold the p of several blocks.
    """

    def __init__(self, term: Term, dw_VK: Tensor, tiles: Tiles):
        self._x, self._dw_VK, self._sum_TK, wide = term.x_pieces, dw_VK, None, tiles.settings.wide
        if dw_VK.dtype != wide or len(tiles.blocks) > 1:
            self._sum_TK = torch.empty_like(dw_VK[tiles.columns[0]], dtype=wide)

    def _sum(self, columns: slice) -> Tensor:
        is_beside = self._sum_TK is not None
        return self._sum_TK[: columns.stop - columns.start] if is_beside else self._dw_VK[columns]

    def add(self, dlogits_NT: Tensor, block: slice, columns: slice) -> None:
        a, b, out = dlogits_NT.T, self._x[block], self._sum(columns)
        product(a, b, out, accumulate=block.start > 0)

    def finish(self, columns: slice) -> None:
        if self._sum_TK is not None:
            self._dw_VK[columns] = self._sum(columns)
