"""The engine against plain PyTorch, on the user's own model and rows.

    plain way   a sequence a forward, the model's own logits, autograd (plain_way.py)
    engine way  what a training step runs, in each layout (engine_way.py)

Compared are the log-probability of every completion token, the loss of every pair and the gradient
of every trained parameter. Both ways run in the precision of the run. On a CPU pair_loss is the
same function both ways: a mistake of its own shows on a GPU alone.

The reference model, dropout, gradient checkpointing and the experts' load-balancing loss are left
out.

A loss of a whole batch (aot, aot_unpaired, sft) mixes per_device_train_batch_size pairs both ways.
AOT sorts them: two log-ratios that differ by less than rounding may swap places, which is reported
as a difference of losses, though neither way is wrong.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.attention import attend_along_trees, attend_as_before
from fastdpo.collate import LAYOUTS
from fastdpo.engine_way import CannotRun, engine_way
from fastdpo.layout import why_padded
from fastdpo.model import attach_scorer, causal_lm_of
from fastdpo.plain_way import SIDES, Answer, Plain
from fastdpo.subject import Subject

# Tolerances, in roundings of the dtype that the layers compute in. In a Llama of 16 random layers
# on a CPU, the padded layout differed by 2.2 roundings of the logits' spread and 10 of a gradient
# in bfloat16; by 7 and 35 in float32, whose sums round too.
LOGP_ROUNDINGS, LEAST_LOGP = 8, 3e-5  # times the logits' spread: nats, rms over tokens
LARGEST = 8  # a single token may be this many times as far off
GRADIENT_ROUNDINGS, LEAST_GRADIENT = 24, 2e-4  # share of a parameter's gradient
SMALL_GRADIENT = 0.01  # of all parameters' gradient: a parameter's own counts as that much larger


class Tolerance(NamedTuple):
    """What the two ways may differ by: a token's log-probability, in nats, rms over all tokens;
    a parameter's gradient, as a share of it."""

    logp: float
    gradient: float

    @classmethod
    def of(cls, dtype: torch.dtype, spread: float) -> "Tolerance":
        """For layers that compute in `dtype`, and logits whose standard deviation is `spread`."""
        eps = torch.finfo(dtype).eps
        logp = max(LEAST_LOGP, LOGP_ROUNDINGS * eps) * max(1.0, spread)
        return cls(logp, max(LEAST_GRADIENT, GRADIENT_ROUNDINGS * eps))


class Finding(NamedTuple):
    """One comparison in one layout, and whether the ways agree in it.

    worst: of all differences the one that is the largest share of what it may be. allowed: what it
    may be. place: where it is. rms: of all differences. The numbers are NaN where nothing could be
    compared: `agrees` then says whether that is as it should be, in a layout that the model cannot
    run, and `place` why.
    """

    layout: str
    what: str
    agrees: bool
    place: str
    worst: float = math.nan
    rms: float = math.nan
    allowed: float = math.nan

    def __str__(self) -> str:
        numbers = "".join(f"{x:>10.1e}" for x in (self.worst, self.rms, self.allowed))
        verdict = "DIFFERS" if not self.agrees else "skipped" if math.isnan(self.worst) else "ok"
        return f"{self.layout:<8}{self.what:<24}{numbers}  {verdict:<8} {self.place}"


HEADER = f"{'layout':<8}{'compared':<24}{'worst':>10}{'rms':>10}{'allowed':>10}  {'':<8} worst at"


def describe(subject: Subject, plain: Plain) -> str:
    """What is compared, and how the tolerances come about, a line each."""
    dtype, policy = subject.compute_dtype, subject.policy
    logp, gradient = Tolerance.of(dtype, plain.spread)
    eps = torch.finfo(dtype).eps
    trained = sum(parameter.numel() for parameter in subject.trained.values())
    tokens = sum(map(len, plain.answer.token_logps))
    batches = f"of {subject.args.per_device_train_batch_size} pairs"
    if isinstance(max_tokens := subject.args.max_tokens_per_forward, int):
        batches += f", in packs of at most {max_tokens:,} tokens"
    lines = (
        f"model      {type(causal_lm_of(policy)).__name__} in {policy.dtype}, {trained:,} trained",
        f"pairs      {len(subject.pairs)} of the first {subject.num_rows} rows, counted from 0, "
        f"with {tokens:,} completion tokens",
        f"batches    {batches}",
        f"tolerance  layers compute in {dtype}: a rounding is {eps:.1e}",
        f"  token      {logp:.1e} nats rms, {LARGEST} times that for one: {LOGP_ROUNDINGS} "
        f"roundings, at least {LEAST_LOGP:g}, times the logits' standard deviation "
        f"({plain.spread:.2g}, at least 1)",
        "  loss       what independent errors of that size in its tokens add up to",
        f"  gradient   {gradient:.1e} of a parameter's own: {GRADIENT_ROUNDINGS} roundings, "
        f"at least {LEAST_GRADIENT:g}",
    )
    if eps > torch.finfo(torch.float32).eps:
        lines += ("  a mistake below these roundings shows in float32 alone: verify there too",)
    return "\n".join(lines)


def compare(subject: Subject, plain: Plain) -> Iterator[Finding]:
    """A Finding for each layout and thing compared, as they come.

    Layouts are all that the model can run, or the one that args.layout names.
    """
    attach_scorer(subject.policy, **subject.args.head_settings)
    tolerance = Tolerance.of(subject.compute_dtype, plain.spread)
    wanted, reason = subject.args.layout, why_padded(subject.policy)
    for layout in LAYOUTS if wanted == "auto" else (wanted,):
        if layout != "padded" and reason is not None:
            yield Finding(layout, "not for this model", True, reason)
            continue
        switch = attend_as_before if layout == "padded" else attend_along_trees
        switch(causal_lm_of(subject.policy))
        try:
            answer = engine_way(subject, layout, plain)
        except torch.OutOfMemoryError:
            raise
        except (CannotRun, TypeError, ValueError, RuntimeError) as error:
            # one that fails at the start makes `auto` pad; in the backward it would end the run
            pads = isinstance(error, CannotRun) and wanted == "auto" and layout != "padded"
            what = "not for this model" if pads else "forward and backward"
            yield Finding(layout, what, pads, " ".join(str(error).split()))
            continue
        for compare_one in (_compare_tokens, _compare_losses, _compare_gradients):
            yield compare_one(subject, layout, plain, answer, tolerance)


def _compare_tokens(subject, layout, plain: Plain, answer: Answer, tolerance: Tolerance) -> Finding:
    ours, theirs = answer.token_logps, plain.answer.token_logps
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if len(a) != len(b):
            place = f"pair {i // 2}, {SIDES[i % 2]}: {len(a)} tokens scored, plainly {len(b)}"
            return Finding(layout, "token log-probabilities", False, place)
    places = [(i // 2, SIDES[i % 2], t) for i, each in enumerate(ours) for t in range(len(each))]
    return _finding(
        layout,
        "token log-probabilities",
        (torch.cat(ours) - torch.cat(theirs)).abs(),
        LARGEST * tolerance.logp,
        lambda c: subject.place(*places[c]),
        rms_allowed=tolerance.logp,
    )


def _compare_losses(subject, layout, plain: Plain, answer: Answer, tolerance: Tolerance) -> Finding:
    """A loss may be off by what independent errors of its tokens, each as allowed, add up to."""
    loss_B = plain.answer.loss_B
    rounding_B = 16 * torch.finfo(loss_B.dtype).eps * (1 + loss_B.abs())
    return _finding(
        layout,
        "pair losses",
        (answer.loss_B - loss_B).abs(),
        LARGEST * tolerance.logp * plain.slope_B + rounding_B,
        lambda b: f"pair {b}",
    )


def _compare_gradients(
    subject, layout, plain: Plain, answer: Answer, tolerance: Tolerance
) -> Finding:
    """Each parameter's difference, as a share of its gradient's length; as it is, where no
    parameter has a gradient."""
    names = list(subject.trained)
    theirs = [_or_zero(plain.answer.gradients[name]) for name in names]
    ours = [_or_zero(answer.gradients[name]) for name in names]
    norm_P = torch.stack([x.norm().cpu() for x in theirs])
    difference_P = torch.stack([(a - b).norm().cpu() for a, b in zip(ours, theirs, strict=True)])
    length_P = norm_P + SMALL_GRADIENT * norm_P.norm()
    share_P = difference_P / (length_P if norm_P.any() else 1)
    return _finding(layout, "gradients (share)", share_P, tolerance.gradient, names.__getitem__)


def _or_zero(gradient: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if gradient is None else gradient.double()


def _finding(
    layout: str,
    what: str,
    difference_N: Tensor,
    allowed: Tensor | float,
    place: Callable[[int], str],
    rms_allowed: float = math.inf,
) -> Finding:
    """The worst of N differences, and what all of them say."""
    difference_N = difference_N.double()  # whose squares are finite
    allowed_N = torch.as_tensor(allowed, device=difference_N.device).expand_as(difference_N)
    rms = difference_N.square().mean().sqrt().item()
    share_N = torch.where(allowed_N.isfinite(), difference_N / allowed_N, math.inf)
    n = int(share_N.argmax())  # a NaN, where there is one; else what has no bound
    worst, most = difference_N[n].item(), allowed_N[n].item()
    agrees = worst <= most < math.inf and rms <= rms_allowed
    return Finding(layout, what, agrees, place(n), worst, rms, most)
