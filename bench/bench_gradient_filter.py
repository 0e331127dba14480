"""What does leaving unlikely tokens out of a head's gradient save, and what is the gradient then?

    OMP_NUM_THREADS=1 pytest bench/bench_gradient_filter.py     two minutes
    pytest bench/bench_gradient_filter.py -m "not slow"         one tiny head, seconds

A frozen head, forward and backward, whole and with Cut Cross-Entropy's threshold of 2**-12, in
turns, as multiples of the bare product. What may be left out depends on how confident the model is
and on which tokens are next to each other. Logits here are a Zipf distribution's, in the order of
its ranks, as the token ids of a byte-pair encoding roughly are, and on top of it noise that differs
from row to row: the larger the noise, the more confident the model. float32 on a CPU, bfloat16 on a
GPU.
"""

import functools
import statistics

import pytest
import torch

from bench.cases import cases
from bench.measure import CUDA, DEVICE, DTYPE, IS_16_BITS, in_turns
from bench.tables import table
from fastdpo import ops

HEADS = {  # N completion tokens, D hidden size, V vocabulary
    "tiny": (64, 32, 4099),
    "SmolLM2-360M-like": (512, 512, 49152),
}
if CUDA:
    HEADS["Llama-3-8B"] = (8192, 4096, 128256)
NOISES = [1.0, 3.0, 6.0, 9.0]  # standard deviation of a logit around its rank's
SKIP_BELOW = 2**-12
ROUNDS = 3
CHECKED_ROWS = 64  # at a time, with full logits
ROUNDING = 0.1 if IS_16_BITS else 1e-4  # of the longest head row


@functools.lru_cache(maxsize=1)  # the noises of a head come one after the other
def drawn(head):
    """hidden_ND, head_VD with noise 1, labels_N; drawn on the device, as a CPU would be slow."""
    N, D, V = HEADS[head]
    torch.manual_seed(0)
    hidden_ND, head_VD = torch.randn(N, D, device=DEVICE), torch.randn(V, D, device=DEVICE)
    return hidden_ND, head_VD / (D - 1) ** 0.5, torch.randint(0, V, (N,), device=DEVICE)


def inputs(head, noise):
    """hidden_ND, head_VD and labels_N; the first of D makes the Zipf distribution."""
    hidden_ND, head_VD, labels_N = drawn(head)
    hidden_ND, head_VD = hidden_ND.clone(), noise * head_VD
    hidden_ND[:, 0], head_VD[:, 0] = 1, -torch.arange(1.0, len(head_VD) + 1, device=DEVICE).log()
    return hidden_ND.to(DTYPE), head_VD.to(DTYPE), labels_N


def step(hidden_ND, head_VD, labels_N, skip_below):
    """The gradient of all log-probabilities' sum in the hidden states."""
    hidden_ND = hidden_ND.detach().requires_grad_()
    ops.linear_logps(hidden_ND, head_VD, labels_N, skip_below=skip_below).sum().backward()
    return hidden_ND.grad


def unlikely(hidden_ND, head_VD):
    """Each row's probability of all tokens below SKIP_BELOW, and its entropy in nats."""
    found = []
    for rows_ND in hidden_ND.split(CHECKED_ROWS):
        logps_NV = (rows_ND @ head_VD.T).float().log_softmax(-1)
        p_NV = logps_NV.exp()
        left_out_N = torch.where(p_NV < SKIP_BELOW, p_NV, 0.0).sum(1)
        found.append(torch.stack([left_out_N, -(p_NV * logps_NV).sum(1)]))
    return torch.cat(found, 1)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("head", cases(HEADS))
def test_gradient_filter(benchmark, head, noise):
    args = inputs(head, noise)
    whole_ND, some_ND = step(*args, 0.0).float(), step(*args, SKIP_BELOW).float()
    error_N = (some_ND - whole_ND).norm(dim=1)
    left_out_N, entropy_N = unlikely(*args[:2])
    longest = args[1].float().norm(dim=1).max()
    assert (error_N <= (left_out_N + ROUNDING) * longest).all(), "a gradient is off by too much"

    out_NV = torch.zeros(*HEADS[head][::2], device=DEVICE, dtype=DTYPE)
    ways = {
        "product": lambda: torch.mm(args[0], args[1].T, out=out_NV),
        "whole": lambda: step(*args, 0.0),
        "filtered": lambda: step(*args, SKIP_BELOW),
    }
    ways["product"]()  # the first one finds its pages
    taken = in_turns(benchmark, ways, ROUNDS)
    product, whole, filtered = (
        statistics.median(each.cost for each in taken[name]) for name in ways
    )
    found = table(
        "A frozen head's gradient, in products, and without tokens less likely than 2**-12; "
        f"medians of {ROUNDS} turns"
    )
    share_N = error_N / whole_ND.norm(dim=1)
    ratios = {"whole": whole / product, "filtered": filtered / product}
    shares = {"mean error, share of the gradient": share_N.mean().item()}
    shares["largest"] = share_N.max().item()
    found.put(
        f"{head}, noise {noise:g}",
        {"mean entropy, nats": entropy_N.mean().item(), **ratios, **shares},
    )
    benchmark.extra_info |= ratios
