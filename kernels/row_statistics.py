"""What linear_logps tells of each row's distribution, from the walk that scored its label."""

import torch
from torch import Tensor

from fastdpo.kernels.fold import RunningSoftmax
from fastdpo.kernels.products import Term
from fastdpo.kernels.vocabulary_walk import Tiles

STATS = ("lse", "entropy", "mean_logit", "is_top1", "log_sum_p2")


def sums_needed(tiles: Tiles) -> tuple[str, ...]:
    """The sums over the vocabulary that the statistics need and nothing else yields."""
    by_products = _is_plain(tiles) and all(term.x_grad for term in tiles.terms)
    by_products &= not tiles.settings.skip_below  # u is then not whole
    by_products &= tiles.settings.operand_dtype == tiles.settings.wide  # in 16 bits p is rounded
    stats = {"log_sum_p2"} if by_products else {"entropy", "mean_logit", "log_sum_p2"}
    return tuple(stats & set(tiles.settings.stats))


def statistics(tiles: Tiles, rows: RunningSoftmax, lse_N, us: list[Tensor | None]) -> list[Tensor]:
    """The statistics asked for, in order; us as the walk leaves them, without the labels' parts."""
    scale, num_tokens = tiles.settings.scale, tiles.terms[0].w_VK.shape[0]
    found = []
    for name in tiles.settings.stats:
        if name == "lse":
            found.append(lse_N.clone())
        elif name == "is_top1":
            found.append(rows.target_N >= rows.peak_N)
        elif name == "log_sum_p2":
            found.append(rows.squares_N.log() - 2 * rows.total_N.log())
        elif name == "entropy" and rows.weighted_N is not None:
            found.append(lse_N - rows.weighted_N / rows.total_N)
        elif name == "entropy":
            dots = [
                _row_dots(tiles, term, u_NK) for term, u_NK in zip(tiles.terms, us, strict=True)
            ]
            label_N = (rows.target_N - lse_N).exp() * rows.target_N
            found.append(lse_N - scale * sum(dots) / rows.total_N - label_N)
        elif rows.sum_N is not None:
            found.append(rows.sum_N / num_tokens)
        else:
            dots = [_row_dots(tiles, term, _mean_w(tiles, term)) for term in tiles.terms]
            found.append(scale * sum(dots))
    return found


def _is_plain(tiles: Tiles) -> bool:
    """Whether logits are linear in the inputs as they are: means then follow from products."""
    settings = tiles.settings
    dtypes = [x.dtype for term in tiles.terms for x in (term.x_NK, term.w_VK)]
    narrowest = settings.rounded_to or settings.operand_dtype
    is_linear = tiles.bias_V is None and settings.softcap is None
    return is_linear and all(torch.promote_types(x, narrowest) == narrowest for x in dtypes)


def _row_dots(tiles: Tiles, term: Term, y: Tensor) -> Tensor:
    """x_n · y_n of each row: a few at a time, as a float32 copy of all would be another (N, K)."""
    y_NK = y.expand(term.x_NK.shape)
    some = tiles.few_rows(term)
    return torch.cat([torch.linalg.vecdot(term.x_NK[n].to(y.dtype), y_NK[n]) for n in some])


def _mean_w(tiles: Tiles, term: Term) -> Tensor:
    """Mean row of the term's weight: (1, K)."""
    wide = tiles.settings.wide
    pieces = (term.w_VK[columns].sum(0, True, dtype=wide) for columns in tiles.columns)
    return sum(pieces) / term.w_VK.shape[0]
