"""What does the loss of a batch of pairs cost, forward and backward, once its tokens are scored?

    OMP_NUM_THREADS=1 pytest bench/bench_pair_loss.py      all batches, a minute
    pytest bench/bench_pair_loss.py -m "not slow"          a tiny one, seconds

On a CPU fastdpo is the torch twin, on a GPU the kernel. TRL's is its trainer's own _compute_loss,
fed with log-probabilities; it and "fastdpo, logged" also sum up what a run logs. Each way's loss
and gradient are compared with float64 first, and a wrong one is not timed. `ops` counts what the
dispatcher is handed, forward and backward; on a GPU the kernel's two launches come on top.
"""

import collections
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import cases
from bench.measure import DEVICE, in_turns
from bench.tables import table
from fastdpo.kernels import reference
from fastdpo.losses import pair_loss
from fastdpo.metrics import MetricSums, pair_metrics

BATCHES = {  # B pairs, the longest completion; lengths are drawn from half of that on
    "tiny": (2, 12),
    "8 pairs": (8, 512),
    "64 pairs": (64, 512),
}
TURNS = 201
LOSS_TYPES = ("sigmoid", "ipo", "apo_zero")
BETA = 0.1


class Batch:
    """The same scored tokens, end to end as fastdpo has them and padded as TRL has them."""

    def __init__(self, B, longest):
        random = torch.Generator().manual_seed(0)
        lengths_S = torch.randint(longest // 2, longest + 1, (2 * B,), generator=random)
        ends_S = lengths_S.cumsum(0)
        token_logps_C = -torch.rand(int(ends_S[-1]), generator=random)
        logps_S = torch.stack([part.sum() for part in token_logps_C.split(lengths_S.tolist())])
        noise_S = 8 * torch.rand(2 * B, generator=random) - 4
        self.num_pairs = B
        self.token_logps_C = token_logps_C.to(DEVICE)
        self.reference_logps_S = (logps_S + noise_S).to(DEVICE)
        self.cu_seqlens = torch.nn.functional.pad(ends_S, (1, 0)).int().to(DEVICE)
        self.labels_C = torch.zeros_like(self.token_logps_C, dtype=torch.int64)
        # one prompt token before every completion
        self.mask_SL = (torch.arange(longest) < lengths_S[:, None]).to(DEVICE)
        self.is_top1_C = self.token_logps_C > -0.3

    def padded(self, values_C):
        return values_C.new_zeros(self.mask_SL.shape).masked_scatter(self.mask_SL, values_C)


class OpCount(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def fastdpo_loss(batch, loss_type):
    token_logps_C = batch.token_logps_C.clone().requires_grad_()

    def step():
        token_logps_C.grad = None
        losses = pair_loss(
            token_logps_C, batch.cu_seqlens, batch.reference_logps_S, beta=BETA, loss_type=loss_type
        )
        (losses.loss_B.sum() / batch.num_pairs).backward()
        return losses

    return lambda: step().loss_B.detach().mean(), step, lambda: token_logps_C.grad


def fastdpo_logged(batch, loss_type):
    value, step, gradient = fastdpo_loss(batch, loss_type)
    sums, logps_C = MetricSums(), batch.token_logps_C
    scored = SimpleNamespace(entropy_C=logps_C, mean_logit_C=logps_C, is_top1_C=batch.is_top1_C)
    return value, lambda: sums.add(pair_metrics(batch, scored, step())), gradient


def of_padded(function, batch):
    """A way whose loss is a function of padded token log-probabilities."""
    logps_SL = batch.padded(batch.token_logps_C).requires_grad_()

    def step():
        logps_SL.grad = None
        loss = function(logps_SL)
        loss.backward()
        return loss.detach()

    return step, step, lambda: logps_SL.grad[batch.mask_SL]


def eager_loss(logps_SL, mask_SL, reference_logps_S, loss_type):
    rewards_S = BETA * ((logps_SL * mask_SL).sum(1) - reference_logps_S)
    lengths = mask_SL.sum(1).clamp(min=1).chunk(2)
    settings = {"lengths": lengths, "beta": BETA, "label_smoothing": 0.0, "tau": 0.05}
    loss_B = sum(reference.LOSSES[name](*rewards_S.chunk(2), **settings) for name in loss_type)
    return loss_B.mean()


def eager(batch, loss_type):
    tensors = batch.mask_SL, batch.reference_logps_S
    return of_padded(lambda logps_SL: eager_loss(logps_SL, *tensors, loss_type), batch)


def compiled(batch, loss_type):
    torch.compiler.reset()  # else the second batch size is compiled for any size
    compiled_loss = torch.compile(eager_loss)
    tensors = batch.mask_SL, batch.reference_logps_S
    return of_padded(lambda logps_SL: compiled_loss(logps_SL, *tensors, loss_type), batch)


def liger(batch, loss_type):
    module = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    loss_of = module.LigerFusedLinearDPOFunction.preference_loss_fn
    references = batch.reference_logps_S.chunk(2)

    def function(logps_SL):
        logps = (logps_SL * batch.mask_SL).sum(1).chunk(2)
        return loss_of(*logps, batch.mask_SL, *references, beta=BETA, loss_type=loss_type[0])[0]

    return of_padded(function, batch)


def trl(batch, loss_type):
    trainer_class = pytest.importorskip("trl").DPOTrainer
    S = 2 * batch.num_pairs
    completion_mask = torch.nn.functional.pad(batch.mask_SL.long(), (1, 0))
    chosen_reference_B, rejected_reference_B = batch.reference_logps_S.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.cat([completion_mask.new_ones(S, 1), completion_mask[:, 1:]], 1),
        "completion_mask": completion_mask,
        "ref_chosen_logps": chosen_reference_B,
        "ref_rejected_logps": rejected_reference_B,
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=DEVICE, gather=_same, gather_for_metrics=_same),
        args=SimpleNamespace(discopop_tau=0.05),
        beta=BETA,
        precompute_ref_logps=True,
        loss_types=loss_type,
        loss_weights=[1.0] * len(loss_type),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        label_smoothing=0.0,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    stats_SL = batch.padded(batch.token_logps_C)
    is_top1_SL = batch.padded(batch.is_top1_C)

    def function(logps_SL):
        outputs = SimpleNamespace(
            log_probs=logps_SL, entropy=stats_SL, mean_logits=stats_SL, is_top1=is_top1_SL
        )
        return trainer_class._compute_loss(trainer, lambda **_: outputs, inputs, False)

    return of_padded(function, batch)


def _same(tensor):
    return tensor


WAYS = {
    "fastdpo": fastdpo_loss,
    "eager": eager,
    "compiled": compiled,
    "liger": liger,
    "fastdpo, logged": fastdpo_logged,
    "TRL, logged": trl,
}


def check(batch, loss_type, loss, gradient_C):
    token_logps_C = batch.token_logps_C.double().requires_grad_()
    loss_B, _ = reference.pair_loss(
        token_logps_C,
        batch.cu_seqlens,
        batch.reference_logps_S.double(),
        beta=BETA,
        loss_type=loss_type,
    )
    loss_B.mean().backward()
    torch.testing.assert_close(loss.double(), loss_B.detach().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient_C.double(), token_logps_C.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss_type", [("sigmoid",), LOSS_TYPES], ids="+".join)
@pytest.mark.parametrize("size", cases(BATCHES))
def test_pair_loss(benchmark, size, loss_type, way):
    row = f"{size}, {'+'.join(loss_type)}: {way}"
    found = table(f"The loss of a batch of pairs, forward and backward; a row: {TURNS} timed turns")
    if way == "liger" and len(loss_type) > 1:
        found.notes[way] = "liger: has no mix of losses, and no ipo"
        pytest.skip("Liger has no mix of losses, and no ipo")
    batch = Batch(*BATCHES[size])
    value, step, gradient = WAYS[way](batch, loss_type)
    check(batch, loss_type, value(), gradient())
    with OpCount() as ops:
        step()
    ours = fastdpo_loss(batch, loss_type)[1]
    taken = in_turns(benchmark, {"ours": ours, "theirs": step}, TURNS)
    costs = [[each.cost for each in taken[name]] for name in ("ours", "theirs")]
    milliseconds = 1e3 * statistics.median(costs[1])
    ratio = statistics.median(theirs / own for own, theirs in zip(*costs, strict=True))
    counted = "-" if way == "compiled" else ops.count  # the dispatcher does not see compiled code
    measured = {"ms": milliseconds, "times fastdpo": ratio, "ops": counted}
    found.put(row, measured)
    benchmark.extra_info |= measured
