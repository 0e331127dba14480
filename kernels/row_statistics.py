"""Statistics of each row's distribution, from what the walk has already summed."""

import torch
from torch import Tensor

from fastdpo.kernels.fold import RunningSoftmax
from fastdpo.kernels.products import Term
from fastdpo.kernels.tiles import Tiles

STATS = ("lse", "entropy", "mean_logit", "is_top1", "log_sum_p2")


def stats_with_sums(tiles: Tiles) -> tuple[str, ...]:
    """Which of the statistics asked for need a sum of their own in the fold."""
    settings = tiles.settings
    u_gives_means = (
        _is_plain(tiles)
        and all(term.x_needs_grad for term in tiles.terms)
        and not settings.skip_below  # u would lack what was skipped
        and settings.operand_dtype == settings.wide  # p in 16 bits is rounded
    )
    stats = {"log_sum_p2"} if u_gives_means else {"entropy", "mean_logit", "log_sum_p2"}
    return tuple(stats & set(settings.stats))


def statistics(
    tiles: Tiles, softmax: RunningSoftmax, lse_N: Tensor, u_of_terms: list[Tensor | None]
) -> list[Tensor]:
    """The statistics asked for, in order; each u is as the walk leaves it, its label left out."""
    compute = {
        "lse": lambda: lse_N,
        # a difference of two numbers as large as the logits, and rounded as they are
        "entropy": lambda: (lse_N - _mean_of_p(tiles, softmax, u_of_terms)).clamp_(min=0),
        "mean_logit": lambda: _mean_logit(tiles, softmax),
        "is_top1": lambda: softmax.label_logit_N >= softmax.peak_N,
        "log_sum_p2": lambda: softmax.exp_square_sum_N.log() - 2 * softmax.total_N.log(),
    }
    return [compute[name]() for name in tiles.settings.stats]


def _mean_logit(tiles: Tiles, softmax: RunningSoftmax) -> Tensor:
    """sum_v z_v / V of each row."""
    if softmax.z_sum_N is not None:
        return softmax.z_sum_N / tiles.V
    dots = [_row_dots(tiles, term, _mean_w(tiles, term)) for term in tiles.terms]
    return tiles.settings.scale * sum(dots)


def _mean_of_p(tiles: Tiles, softmax: RunningSoftmax, u_of_terms: list[Tensor | None]) -> Tensor:
    """sum_v p_v z_v of each row."""
    if softmax.exp_z_sum_N is not None:
        return softmax.exp_z_sum_N / softmax.total_N
    pairs = zip(tiles.terms, u_of_terms, strict=True)
    dots = [_row_dots(tiles, term, u_NK) for term, u_NK in pairs]
    # computed as logp is: lse has the rounding of a logit, and would be multiplied by one
    logp_N = softmax.label_logit_N - softmax.peak_N - softmax.total_N.log()
    label_term_N = logp_N.exp() * softmax.label_logit_N
    return tiles.settings.scale * sum(dots) / softmax.total_N + label_term_N


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
    dots = [
        torch.linalg.vecdot(term.x_NK[chunk].to(y.dtype), y_NK[chunk])
        for chunk in tiles.row_chunks(term)
    ]
    return torch.cat(dots)


def _mean_w(tiles: Tiles, term: Term) -> Tensor:
    """Mean row of the term's weight: (1, K)."""
    wide = tiles.settings.wide
    pieces = (term.w_pieces[columns].sum(0, True, dtype=wide) for columns in tiles.columns)
    return sum(pieces) / tiles.V
