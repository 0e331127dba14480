"""How one call of linear_logps is cut into tiles: some rows by some of the vocabulary.

Settings    what was asked for
Tiles       the tiles of a call, and scratch memory for one
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.products import HeadRows, Term, has_fast_mkl

# Tiles of logits. The CPU's stay near its cache, MKL's products want them larger
# (bench/results/cpu.md); for any number of rows they have the same columns. Each tile of columns
# reads and writes all of u once: a GPU's are as wide as the rows that the fold can keep in
# registers (fold.MOST_IN_REGISTERS).
TILE_ROWS = {"cpu": 1024 if has_fast_mkl() else 512, "cuda": 4096}
TILE_COLUMNS = {"cpu": 2048 if has_fast_mkl() else 1024, "cuda": 8192}
FEW_ROWS = 2048  # with fewer, a GPU's tile may be wider, for fewer launches
LEAST_ROWS = {"cpu": 512, "cuda": 1024}  # not shrunk below this to fit a gradient's memory
MOST_ROWS = 8192  # nor does a GPU's tile grow beyond this to fill it
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
    def any_weight_needs_grad(self) -> bool:
        """Whether the head, an adapter's up_VR or the bias wants a gradient."""
        return self.bias_needs_grad or any(w_needs for _, w_needs in self.terms_need_grad)

    def terms(self, *factors: Tensor | HeadRows) -> list[Term]:
        """The terms of the logits; factors: x and w of each, one after the other."""
        pairs = zip(factors[::2], factors[1::2], self.terms_need_grad, strict=True)
        dtypes = self.operand_dtype, self.rounded_to
        return [Term(x, w, need_grad, *dtypes) for x, w, need_grad in pairs]


class Tiles:
    """The tiles of one call, each a block of rows by some columns; z_scratch, for the logits of one
    tile."""

    def __init__(
        self, terms: list[Term], bias_V: Tensor | None, labels_N: Tensor, settings: Settings
    ):
        room = _rows_with_room(terms, settings.operand_dtype)
        self.V, D = terms[0].w_VK.shape
        most_rows, width = tile_shape(labels_N.device.type, len(labels_N), self.V, D, room)
        self.blocks = even_slices(len(labels_N), most_rows)
        self.columns = slices(self.V, width)
        self.terms, self.settings, self.labels_N = terms, settings, labels_N
        self.bias_V = None if bias_V is None else bias_V.contiguous()
        size = most_rows * self._stride(width)
        self.z_scratch = torch.empty(size, dtype=settings.wide, device=labels_N.device)

    @functools.cached_property
    def p_scratch(self) -> Tensor:
        """For the p of one tile; the logits' memory where the dtypes are equal."""
        dtype = self.settings.operand_dtype
        if dtype == self.z_scratch.dtype:
            return self.z_scratch
        return torch.empty_like(self.z_scratch, dtype=dtype)

    def row_chunks(self, term: Term) -> list[slice]:
        """All rows, in chunks whose float32 copy takes a quarter of a tile's memory."""
        return slices(len(self.labels_N), max(1, len(self.z_scratch) // (4 * term.x_NK.shape[1])))

    def size(self, block: slice, columns: slice) -> int:
        """Elements of memory that one tile takes."""
        return (block.stop - block.start) * self._stride(columns.stop - columns.start)

    def view(self, memory: Tensor, block: slice, columns: slice) -> Tensor:
        """One tile, (rows, columns), at the beginning of flat `memory`."""
        width = columns.stop - columns.start
        return memory[: self.size(block, columns)].view(-1, self._stride(width))[:, :width]

    def _stride(self, columns: int) -> int:
        return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


def _rows_with_room(terms: list[Term], p_dtype: torch.dtype) -> int:
    """How many rows' p the memory of the first trained weight's gradient has room for."""
    trained = next((term.w_VK for term in terms if term.w_needs_grad), None)
    return 0 if trained is None else trained.shape[1] * trained.itemsize // p_dtype.itemsize


def tile_shape(device_type: str, N: int, V: int, D: int, room: int) -> tuple[int, int]:
    """Rows and columns of a tile; the rows are shared out evenly.

    Of a trained head, as many rows as there is `room` for where p may be kept, if that is not too
    few; on a CPU at most as many as of a frozen one. On a GPU, more rows leave fewer columns, and
    few rows allow more; a large D leaves fewer, as the head's (columns, D) slice, which may have to
    be converted or dequantised, is never larger than a full tile of logits.
    """
    rows, columns = TILE_ROWS[device_type], TILE_COLUMNS[device_type]
    size = rows * columns
    if room >= LEAST_ROWS[device_type]:
        rows = min(room, MOST_ROWS if device_type == "cuda" else rows)
    num_blocks = -(-N // rows)
    rows = -(-N // num_blocks)  # the longest of even_slices
    if device_type == "cuda":
        most = columns if rows >= FEW_ROWS else V
        columns = min(most, max(1, size // max(rows, D) // ROW_MULTIPLE) * ROW_MULTIPLE)
    return rows, min(V, columns)


def slices(total: int, step: int) -> list[slice]:
    """All of `total`, `step` at a time."""
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def even_slices(total: int, most: int) -> list[slice]:
    """The fewest slices of at most `most`, as equal as can be: none is left with a few rows.

    The longer ones come first, so that memory for the first does for all.
    """
    count = -(-total // most)
    return [slice(-(-i * total // count), -(-(i + 1) * total // count)) for i in range(count)]
