"""The p of tiles, kept from the forward for the gradient of the weights."""

import torch
from torch import Tensor

from fastdpo.kernels.tiles import Tiles


class KeptTiles:
    """The p of as many tiles as find room; a tile is known by where its block and columns start.

    First in the memory of the first trained weight's gradient, which is allocated here: p of some
    columns lies in the gradient's rows of those columns, which the backward writes only once it has
    read that p. Then in a buffer of head_cache_bytes.

        take_room         forward: memory for a tile's p, or None
        keep              forward: the p that was made there, and the peaks it was made with
        take              backward: both
        take_gradients    backward: the gradients, to be written; in the first may lie p
    """

    def __init__(self, tiles: Tiles):
        self._gradients = _new_gradients(tiles)
        self._rooms = self._find_rooms(tiles) if tiles.settings.any_weight_needs_grad else {}
        self._kept = {}

    def _find_rooms(self, tiles: Tiles) -> dict[tuple[int, int], Tensor]:
        rooms, elsewhere, dtype = {}, {}, tiles.settings.operand_dtype
        for columns in tiles.columns:
            sizes = {(b.start, columns.start): tiles.size(b, columns) for b in tiles.blocks}
            rooms |= _share_out(self._memory_of_gradient(columns, dtype), sizes)
            elsewhere |= {tile: size for tile, size in sizes.items() if tile not in rooms}
        size = min(tiles.settings.head_cache_bytes // dtype.itemsize, sum(elsewhere.values()))
        cache = tiles.z_scratch.new_empty(size, dtype=dtype)
        return rooms | _share_out(cache, elsewhere)

    def _memory_of_gradient(self, columns: slice, dtype: torch.dtype) -> Tensor:
        """The rows of these columns in the first gradient, as flat memory of `dtype`."""
        first = next((dw_VK for dw_VK in self._gradients if dw_VK is not None), None)
        # a single column may have any stride, and is contiguous; view(dtype) wants 1
        if first is None or not first.is_contiguous() or first.stride(-1) != 1:
            return torch.empty(0, dtype=dtype)
        memory = first[columns].view(-1)
        whole_bytes = memory.nbytes // dtype.itemsize * dtype.itemsize
        return memory[: whole_bytes // memory.element_size()].view(dtype)

    def take_room(self, block: slice, columns: slice) -> Tensor | None:
        """Memory for a tile's p, handed out once; None if there is none."""
        return self._rooms.pop((block.start, columns.start), None)

    def keep(self, block: slice, columns: slice, p_NT: Tensor, peak_N: Tensor) -> None:
        """Keep p and a copy of the peaks that it was made with."""
        self._kept[block.start, columns.start] = p_NT, peak_N.clone()

    def take(self, block: slice, columns: slice) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What was kept of a tile, once."""
        return self._kept.pop((block.start, columns.start), (None, None))

    def take_gradients(self, tiles: Tiles) -> list[Tensor | None]:
        """Memory for each dw_VK, None where frozen; new from the second backward on."""
        taken, self._gradients = self._gradients, None
        return _new_gradients(tiles) if taken is None else taken


def _share_out(memory: Tensor, sizes: dict[tuple[int, int], int]) -> dict[tuple[int, int], Tensor]:
    """A piece of flat memory for each tile, in order, that still fits into what is left."""
    rooms = {}
    for tile, size in sizes.items():
        if size <= len(memory):
            rooms[tile], memory = memory[:size], memory[size:]
    return rooms


def _new_gradients(tiles: Tiles) -> list[Tensor | None]:
    return [torch.empty_like(term.w_VK) if term.w_needs_grad else None for term in tiles.terms]
