"""The engine's way: what a training step runs, in any layout, in whole batches or in packs.

    collator --> score --> pair_loss, or pack_losses where it mixes pairs of several packs

Its losses are those at the plain way's reference. Its gradients are those at the plain way's
log-ratios: with its own, which rounding moves by nats in 16 bits, they would be off by the loss's
curvature, though neither way is wrong.
"""

from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from fastdpo.batch import PairBatch
from fastdpo.batch_loss import PackLogps, PackLoss, pack_losses
from fastdpo.collate import make_collator
from fastdpo.columns import ID_COLUMNS
from fastdpo.kernels import reference
from fastdpo.losses import PairLoss, pair_loss
from fastdpo.model import ScoredOutput, inference, score
from fastdpo.packs import Collator, into_packs
from fastdpo.plain_way import SIDES, Answer, Plain
from fastdpo.subject import Subject


class CannotRun(Exception):
    """A forward failed, as one may in a layout that does not fit the model."""


class Forward(NamedTuple):
    """The pairs of a training batch that run in one forward: B of all pairs, by number."""

    numbers_B: list[int]
    batch: PairBatch

    @property
    def lengths_S(self) -> list[int]:
        return self.batch.cu_seqlens.diff().tolist()


def engine_way(subject: Subject, layout: str, plain: Plain) -> Answer:
    """As a training step has it, batches of per_device_train_batch_size pairs in `layout`.

    A number in max_tokens_per_forward splits them into packs. CannotRun where a forward fails.
    """
    args, num_pairs = subject.args, len(subject.pairs)
    collator = make_collator(
        layout, pad_token_id=subject.tokenizer.pad_token_id, **args.collator_settings
    )
    token_logps, losses = {}, {}  # by completion and by pair
    subject.policy.zero_grad()
    for few in torch.arange(num_pairs).split(args.per_device_train_batch_size):
        forwards = _forwards(subject, few.tolist(), collator)
        shares = [None] * len(forwards)
        if args.mixes_pairs and len(forwards) > 1:
            shares = _shares(subject, plain, forwards)
        for forward, share in zip(forwards, shares, strict=True):
            scored = _score(subject, forward)
            at_reference, at_logratios = _losses(subject, plain, forward, scored, share)
            (at_logratios.loss_B.sum() / num_pairs).backward()
            losses |= zip(forward.numbers_B, at_reference.loss_B.detach(), strict=True)
            sides = [(b, side) for side in SIDES for b in forward.numbers_B]
            completions = scored.token_logps_C.detach().split(forward.lengths_S)
            token_logps |= zip(sides, completions, strict=True)
    return Answer(
        token_logps=[token_logps[b, side] for b in range(num_pairs) for side in SIDES],
        loss_B=torch.stack([losses[b] for b in range(num_pairs)]),
        gradients=subject.take_gradients(),
    )


def _forwards(subject: Subject, numbers: list[int], collator: Collator) -> list[Forward]:
    pairs = [{name: subject.pairs[b][name] for name in ID_COLUMNS} | {"number": b} for b in numbers]
    packs, max_tokens = [pairs], subject.args.max_tokens_per_forward
    if isinstance(max_tokens, int):
        packs = into_packs(pairs, max_tokens, collator)
    return [
        Forward(
            [pair["number"] for pair in pack],
            PairBatch.from_inputs(send_to_device(collator(pack), subject.args.device)),
        )
        for pack in packs
    ]


def _score(subject: Subject, forward: Forward) -> ScoredOutput:
    with subject.autocast():
        try:
            scored = score(subject.policy, forward.batch, stats=subject.args.token_stats)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise CannotRun(str(error)) from error
    # unlike a GPU's pair_loss this refuses lengths that do not fit the tokens
    scored.token_logps_C.split(forward.lengths_S)
    return scored


def _with_both_references(
    subject: Subject, plain: Plain, forward: Forward, token_logps_C: Tensor
) -> tuple[PackLogps, PackLogps]:
    """The plain way's reference, for the losses; and one that leads to the plain way's log-ratios,
    for the gradients."""
    cu_seqlens = forward.batch.cu_seqlens
    logps_S = reference.completion_sums(token_logps_C.detach(), cu_seqlens, subject.args.ld_alpha)
    reference_logps_S, logratios_S = (
        each_B2[forward.numbers_B].T.flatten().to(logps_S)  # chosen, then rejected
        for each_B2 in (plain.reference_logps_B2, plain.logratios_B2)
    )
    references = reference_logps_S, logps_S - logratios_S
    return tuple(PackLogps(token_logps_C, cu_seqlens, each_S) for each_S in references)


def _losses(
    subject: Subject,
    plain: Plain,
    forward: Forward,
    scored: ScoredOutput,
    share: tuple[PackLoss, PackLoss] | None,
) -> list[PairLoss]:
    """The forward's losses with each of both references.

    share: its part of a batch that mixes pairs, with each.
    """
    if share is not None:
        cu_seqlens = forward.batch.cu_seqlens
        return [loss.with_gradient(scored.token_logps_C, cu_seqlens) for loss in share]
    settings = subject.args.loss_settings | {"log_sum_p2_C": scored.log_sum_p2_C}
    both = _with_both_references(subject, plain, forward, scored.token_logps_C)
    return [pair_loss(*logps, **settings) for logps in both]


def _shares(
    subject: Subject, plain: Plain, forwards: list[Forward]
) -> list[tuple[PackLoss, PackLoss]]:
    """Each forward's part of its batch's loss, with each of both references."""
    with inference(subject.policy):
        of_forwards = [
            _with_both_references(subject, plain, each, _score(subject, each).token_logps_C)
            for each in forwards
        ]
    settings = subject.args.loss_settings
    both = [pack_losses(list(packs), **settings) for packs in zip(*of_forwards, strict=True)]
    return list(zip(*both, strict=True))
