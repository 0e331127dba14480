"""The loops of linear_logps over tiles of logits, a block of rows by some of the vocabulary.

The forward folds each tile into its rows' online softmax and into u, the sum of
exp(z_v - peak) c_v w_v over all v but the label. The backward takes the p of a tile from where it
was kept, or computes it again, for the gradient of the weights. README.md has the maths, and the
letters.
"""

import torch
from torch import Tensor

from fastdpo.kernels.dlogits import DLOGITS
from fastdpo.kernels.fold import FOLDS, RunningSoftmax
from fastdpo.kernels.kept_tiles import KeptTiles
from fastdpo.kernels.products import Term, product
from fastdpo.kernels.second_product import SECOND_PRODUCTS
from fastdpo.kernels.tiles import Tiles


def walk(tiles: Tiles, softmax: RunningSoftmax, kept: KeptTiles) -> list[Tensor | None]:
    """Fold every tile into `softmax`. Returns u_NK of each term, None where x needs no gradient."""
    settings = tiles.settings
    second_product = SECOND_PRODUCTS[settings.backend]
    wide = {"dtype": settings.wide, "device": tiles.z_scratch.device}
    # with a filter, a first tile may leave some of u unwritten
    new = torch.zeros if settings.skip_below else torch.empty
    u_of_terms = [
        new(term.x_NK.shape, **wide) if term.x_needs_grad else None for term in tiles.terms
    ]
    scratch = tiles.p_scratch if any(u_NK is not None for u_NK in u_of_terms) else None
    blocks = [(block, softmax.of_rows(block)) for block in tiles.blocks]
    for columns in tiles.columns:
        for block, block_softmax in blocks:
            room = kept.take_room(block, columns)
            memory = scratch if room is None else room
            p_NT = _fold_tile(tiles, block, columns, block_softmax, memory)
            if room is not None:
                kept.keep(block, columns, p_NT, block_softmax.peak_N)
            for term, u_NK in zip(tiles.terms, u_of_terms, strict=True):
                if u_NK is not None:
                    w_TK = term.w_pieces[columns]
                    if columns.start == 0 and not settings.skip_below:
                        product(p_NT, w_TK, u_NK[block], accumulate=False)
                    else:
                        second_product(p_NT, w_TK, u_NK[block], block_softmax, settings.skip_below)
    return u_of_terms


def _fold_tile(
    tiles: Tiles, block: slice, columns: slice, softmax: RunningSoftmax, memory: Tensor | None
) -> Tensor | None:
    """Fold one tile into its rows' `softmax`. Returns its p, made in `memory`; None without."""
    settings, z_NT = tiles.settings, tiles.view(tiles.z_scratch, block, columns)
    p_NT = None if memory is None else tiles.view(memory, block, columns)
    if p_NT is not None and p_NT.dtype == z_NT.dtype:
        z_NT = p_NT
    for k, term in enumerate(tiles.terms):
        x_NK, w_TK = term.x_pieces[block], term.w_pieces[columns]
        product(x_NK, w_TK.T, z_NT, accumulate=k > 0, batch_invariant=True)
    bias_T = None if tiles.bias_V is None else tiles.bias_V[columns]
    fold, labels_N = FOLDS[settings.backend], tiles.labels_N[block]
    fold(z_NT, p_NT, bias_T, labels_N, columns.start, softmax, settings.scale, settings.softcap)
    return p_NT


def weight_gradients(
    tiles: Tiles,
    p_coefficient_N: Tensor,
    peak_N: Tensor,
    log_total_N: Tensor,
    dlogp_dlabel_N: Tensor,
    kept: KeptTiles,
) -> tuple[list[Tensor | None], Tensor | None]:
    """dw_VK = dlogits_NVᵀ x_NK of each term that wants it, and dbias_V in float32.

    dlogits are p_coefficient_N p_NV, and -p_coefficient_N dlogp_dlabel_N in a label's column;
    lse = peak_N + log_total_N.
    """
    settings, wide, device = tiles.settings, peak_N.dtype, peak_N.device
    dws = kept.take_gradients(tiles)
    terms = zip(tiles.terms, dws, strict=True)
    weights = [_WeightGradient(term, dw, tiles) for term, dw in terms if dw is not None]
    make_dlogits = DLOGITS[settings.backend]
    dlabel_N = -p_coefficient_N * dlogp_dlabel_N
    dbias_V = torch.zeros_like(tiles.bias_V, dtype=wide) if settings.bias_needs_grad else None
    for columns in tiles.columns:
        for block in tiles.blocks:
            p_NT, tile_peak_N = kept.take(block, columns)
            if p_NT is None:
                fresh = RunningSoftmax.start(block.stop - block.start, wide, device)
                p_NT = _fold_tile(tiles, block, columns, fresh, tiles.p_scratch)
                tile_peak_N = fresh.peak_N
            # the peaks first: lse has the rounding of a logit
            row_scale_N = (tile_peak_N - peak_N[block] - log_total_N[block]).exp_()
            row_scale_N *= p_coefficient_N[block]
            dlogits_NT = tiles.view(tiles.p_scratch, block, columns)
            labels_N = tiles.labels_N[block]
            make_dlogits(p_NT, dlogits_NT, row_scale_N, dlabel_N[block], labels_N, columns.start)
            for weight in weights:
                weight.add(dlogits_NT, block, columns)
            if dbias_V is not None:
                dbias_V[columns] += dlogits_NT.sum(0, dtype=wide)
        for weight in weights:
            weight.finish(columns)
    return dws, dbias_V


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
        product(dlogits_NT.T, self._x[block], self._sum(columns), accumulate=block.start > 0)

    def finish(self, columns: slice) -> None:
        if self._sum_TK is not None:
            self._dw_VK[columns] = self._sum(columns)
