"""The loss of a batch that runs in packs, where a pair's part of it depends on other packs' pairs.

    each pack, no gradient --> PackLogps --\\
                                            pack_losses --> a PackLoss for each pack
    each pack, with gradient --> token logps --PackLoss.with_gradient--> PairLoss

Every pack is run twice: for its log-probabilities alone, then, once the loss of all of them and
its slope in each token are known, for the gradient: that of sum(slope * token_logp), which is the
loss's as long as both forwards score a token the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.batch import cu_seqlens_of
from fastdpo.kernels.reference import completion_sums
from fastdpo.losses import PairLoss, pair_loss


class PackLogps(NamedTuple):
    """What pair_loss takes of one pack's S = 2B completions, chosen 0..B-1, then rejected."""

    token_logps_C: Tensor
    cu_seqlens: Tensor
    reference_logps_S: Tensor


@dataclass(frozen=True, slots=True)
class PackLoss:
    """A pack's B pairs within the loss of its batch, and that loss's slope in their C tokens.

    (No NamedTuple: a Trainer would rebuild it on its way to compute_loss.)
    """

    pairs: PairLoss
    slope_C: Tensor
    reference_logps_S: Tensor

    def with_gradient(self, token_logps_C: Tensor, cu_seqlens: Tensor) -> PairLoss:
        """`pairs`, whose loss_B now carries its gradient to the pack's token_logps_C."""
        change_C = token_logps_C - token_logps_C.detach()  # 0, but for its gradient
        chosen_B, rejected_B = completion_sums(self.slope_C * change_C, cu_seqlens).chunk(2)
        return self.pairs._replace(loss_B=self.pairs.loss_B + chosen_B + rejected_B)


def with_pack_losses(
    packs: list[dict[str, Any]], score_pack: Callable[[dict[str, Any]], PackLogps], **settings: Any
) -> list[dict[str, Any]]:
    """Each pack's inputs and, as "pack_loss", its PackLoss; settings: pair_loss's."""
    logps = [score_pack(pack) for pack in packs]  # fillers too: ranks run as many forwards
    num_real = sum("is_filler" not in pack for pack in packs)
    losses = pack_losses(logps[:num_real], **settings)
    losses += losses[-1:] * (len(packs) - num_real)  # a filler is the last pack again
    return [pack | {"pack_loss": loss} for pack, loss in zip(packs, losses, strict=True)]


def pack_losses(packs: list[PackLogps], **settings: Any) -> list[PackLoss]:
    """The loss of all packs' pairs as one batch, in the packs' order, taken apart again.

    The slopes are those of the sum over pairs. Nothing here makes the CPU wait for the device.
    """
    token_logps = [pack.token_logps_C.detach().requires_grad_() for pack in packs]
    lengths_S = _one_batch([pack.cu_seqlens.diff() for pack in packs])
    cu_seqlens = cu_seqlens_of(lengths_S)
    whole = pair_loss(
        torch.cat(token_logps).index_select(0, _tokens_moved(packs, lengths_S, cu_seqlens)),
        cu_seqlens,
        _one_batch([pack.reference_logps_S for pack in packs]),
        **settings,
    )
    slopes = torch.autograd.grad(whole.loss_B.sum(), token_logps)
    counts = [len(pack.reference_logps_S) // 2 for pack in packs]
    parts = zip(whole.loss_B.detach().split(counts), whole.metrics_MB.split(counts, 1), strict=True)
    return [
        PackLoss(PairLoss(*part), slope_C, pack.reference_logps_S)
        for part, slope_C, pack in zip(parts, slopes, packs, strict=True)
    ]


def _tokens_moved(packs: list[PackLogps], lengths_S: Tensor, cu_seqlens: Tensor) -> Tensor:
    """For each token of the batch, where it is in the packs laid end to end: int64 (C,)."""
    counts = [len(pack.token_logps_C) for pack in packs]
    firsts = [sum(counts[:i]) for i in range(len(packs))]
    starts_S = _one_batch(
        [pack.cu_seqlens[:-1] + first for pack, first in zip(packs, firsts, strict=True)]
    )
    moved_S = starts_S - cu_seqlens[:-1]
    C = sum(counts)
    return torch.arange(C, device=lengths_S.device) + moved_S.repeat_interleave(
        lengths_S, output_size=C
    )


def _one_batch(of_packs: list[Tensor]) -> Tensor:
    """Values of each pack's completions as those of one batch: all chosen, then all rejected."""
    chosen, rejected = zip(*(each_S.chunk(2) for each_S in of_packs), strict=True)
    return torch.cat([*chosen, *rejected])
