"""How much more than the bare product does a head cost, up to DPO's loss, forward and backward?

    OMP_NUM_THREADS=1 pytest bench/bench_linear_logps.py      real models' vocabularies, an hour
    pytest bench/bench_linear_logps.py -m "not slow"          one tiny head, seconds

Every way of bench/head_ways.py is compared with float64 first, and a wrong one is not timed. A
cell: median time as a multiple of `hidden @ head.T` into a preallocated output, taken in turns with
it, and in brackets MiB of memory at its peak beyond the inputs and gradients. Other tables have the
errors of a completion's log-probability and of a token's, and the time of two threads against
one's. float32 on a CPU, bfloat16 on a GPU; BENCH_DTYPE=bfloat16 or float32 asks for either.
"""

import functools
import os
import statistics
from collections import defaultdict

import pytest
import torch

from bench.cases import cases
from bench.head_ways import PAIRS, TOKEN_WAYS, WAYS, dpo_loss, reason_to_skip
from bench.measure import CUDA, DEVICE, DTYPE, IS_16_BITS, PeakMemory, in_turns, seconds
from bench.tables import table
from fastdpo.kernels import reference

HEADS = {  # N completion tokens, D hidden size, V vocabulary
    "tiny": (64, 32, 4099),
    "SmolLM2-360M-like": (512, 512, 49152),
    "Llama-2-like": (1024, 1024, 32000),
    "Qwen2.5-0.5B": (256, 896, 151936),
}
if CUDA:
    HEADS["Llama-3-8B"] = (8192, 4096, 128256)
ROUNDS = 3
SLOW = 10  # products: a way this slow gets one round
CHECKED_ROWS = 64  # at a time, in float64
# of a completion's log-probability in nats, and of a gradient as a share of its largest element;
# tiles of bfloat16 logits are off by up to a nat in a completion, and ours are not of bfloat16
NATS, GRADIENT = (2.0, 0.1) if IS_16_BITS else (2e-3, 2e-4)
NATS_OF_OURS, GRADIENT_OF_OURS = (2e-2, 1e-2) if IS_16_BITS else (2e-3, 2e-4)
heads = pytest.mark.parametrize("head", cases(HEADS))
modes = pytest.mark.parametrize("mode", ["forward", "frozen", "trained"])
product_seconds = defaultdict(list)  # of each head, in all turns so far
largest_errors = defaultdict(list)  # of each way and head, in every mode so far


@functools.lru_cache(maxsize=1)  # the cases of a head come one after the other
def inputs(head):
    """hidden_ND, head_VD and labels_N."""
    N, D, V = HEADS[head]
    torch.manual_seed(0)
    hidden_ND = torch.randn(N, D, device=DEVICE).to(DTYPE)
    head_VD = (torch.randn(V, D, device=DEVICE) / D**0.5).to(DTYPE)
    return hidden_ND, head_VD, torch.randint(0, V, (N,), device=DEVICE)


@functools.lru_cache(maxsize=1)
def truth(head):
    """token_logps_N, and what `step` returns of a trained head; both computed in float64."""
    hidden_ND, head_VD, labels_N = inputs(head)
    wide_ND, wide_VD = hidden_ND.double(), head_VD.double()

    def token_logps(rows):
        return reference.linear_logps(wide_ND[rows], wide_VD, labels_N[rows])

    chunks = [slice(n, n + CHECKED_ROWS) for n in range(0, len(labels_N), CHECKED_ROWS)]
    with torch.no_grad():
        token_logps_N = torch.cat([token_logps(rows) for rows in chunks])
    loss, logps_S = dpo_loss(token_logps_N.requires_grad_())
    (dtoken_logps_N,) = torch.autograd.grad(loss, token_logps_N)
    wide_ND.requires_grad_()
    wide_VD.requires_grad_()
    for rows in chunks:
        token_logps(rows).backward(dtoken_logps_N[rows])
    return token_logps_N.detach(), (logps_S.detach(), wide_ND.grad.float(), wide_VD.grad.float())


def step(way, mode, hidden_ND, head_VD, labels_N):
    """logps_S, and the loss's gradients of what `mode` trains: the hidden states, and the head."""
    hidden_ND = hidden_ND.detach().requires_grad_(mode != "forward")
    head_VD = head_VD.detach().requires_grad_(mode == "trained")
    loss, logps_S = WAYS[way](hidden_ND, head_VD, labels_N)
    if mode != "forward":
        loss.backward()
    return logps_S.detach(), *(x.grad for x in (hidden_ND, head_VD) if x.requires_grad)


def errors(way, made, wanted):
    """Largest and rms error of logps_S; fails where they or a gradient are wrong."""
    is_ours = way.startswith("fastdpo")
    nats, share = (NATS_OF_OURS, GRADIENT_OF_OURS) if is_ours else (NATS, GRADIENT)
    error_S = made[0] - wanted[0]
    assert error_S.abs().max() < nats, f"off by {error_S.abs().max():.1e} nats"
    for gradient, wanted_gradient in zip(made[1:], wanted[1:], strict=False):
        assert gradient is not None, "a gradient is missing"
        error = (gradient - wanted_gradient).abs().max() / wanted_gradient.abs().max()
        assert error < share, f"a gradient is off by {error:.1e} of its largest element"
    return _largest_and_rms(error_S)


def token_errors(way, head):
    """Largest and rms error of token_logps_N, of a way that makes them."""
    with torch.no_grad():
        return _largest_and_rms(TOKEN_WAYS[way](*inputs(head)) - truth(head)[0])


def _largest_and_rms(error):
    return error.abs().max().item(), error.square().mean().sqrt().item()


def peak_and_cost(way, mode, args):
    """MiB at the peak of one step, inputs and gradients aside, and its seconds."""
    peak, made = PeakMemory(), []
    cost = seconds(lambda: made.extend(step(way, mode, *args))).cost
    return peak.mib() - sum(x.nbytes for x in made[1:]) / 2**20, cost


@modes
@pytest.mark.parametrize("way", WAYS)  # a way's modes in a row: some are compiled anew for each way
@heads
def test_linear_logps(benchmark, head, mode, way):
    found = table(
        "Heads, in products of hidden states and head (peak MiB); a cell: the tokens of "
        f"{PAIRS} pairs, {ROUNDS} timed turns, 1 of a way slower than {SLOW} products"
    )
    column = f"{head} {mode}"
    if reason := reason_to_skip(way, mode):
        found.put(way, {column: "-"})
        found.notes[way] = f"{way}: {reason}"
        pytest.skip(reason)
    found.put(way, {column: "not measured"})  # unless it gets to the end
    torch.compiler.reset()  # a function compiled for eight cases would run the ninth uncompiled
    args = inputs(head)
    out_NV = torch.zeros(*HEADS[head][::2], device=DEVICE, dtype=DTYPE)

    largest, rms = errors(way, step(way, mode, *args), truth(head)[1])
    turns = {
        "product": lambda: torch.mm(args[0], args[1].T, out=out_NV),
        "step": lambda: step(way, mode, *args),
    }
    turns["product"]()  # the first one finds its pages
    peak_mib, cost = peak_and_cost(way, mode, args)
    is_slow = cost > SLOW * seconds(turns["product"]).cost
    taken = in_turns(benchmark, turns, 1 if is_slow else ROUNDS)
    products, steps = ([each.cost for each in taken[name]] for name in turns)
    ratio = statistics.median(steps) / statistics.median(products)
    product_seconds[head] += products
    found.put(way, {column: f"{ratio:.2f} ({peak_mib:.0f})"})
    found.notes[head] = product_of(head)
    largest_errors[way, head].append(largest)
    table("Largest error of a completion's log-probability, nats").put(
        way, {head: f"{max(largest_errors[way, head]):.1e}"}
    )
    if mode == "forward" and way in TOKEN_WAYS:
        token_largest, token_rms = token_errors(way, head)
        table("Error of a token's log-probability, nats: rms, and largest").put(
            way, {head: f"{token_rms:.1e}, {token_largest:.1e}"}
        )
        benchmark.extra_info |= {"token_max": token_largest, "token_rms": token_rms}
    benchmark.extra_info |= {"products": ratio, "peak_mib": peak_mib, "max": largest, "rms": rms}


def product_of(head):
    (N, D, V), taken = HEADS[head], statistics.median(product_seconds[head])
    return (
        f"{head}: N, D, V = {N}, {D}, {V}; one product takes {1e3 * taken:.4g} ms, "
        f"{2e-9 * N * D * V / taken:.0f} GFLOP/s"
    )


@modes
@heads
@pytest.mark.skipif(CUDA, reason="of a CPU's threads")
def test_two_threads(benchmark, head, mode):
    """Two threads' wall time as a share of one's, in turns."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("want two cores, got one")
    args = inputs(head)
    out_NV = torch.zeros(*HEADS[head][::2], dtype=DTYPE)
    steps = {
        "bare product": lambda: torch.mm(args[0], args[1].T, out=out_NV),
        "fastdpo": lambda: step("fastdpo", mode, *args),
    }
    taken = {(name, threads): [] for name in steps for threads in (1, 2)}
    threads_before = torch.get_num_threads()

    def turn():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            steps["bare product"]()  # starts the threads
            for name in steps:
                taken[name, threads].append(seconds(steps[name]).wall)

    try:
        benchmark.pedantic(turn, rounds=ROUNDS)
    finally:
        torch.set_num_threads(threads_before)
    for name in steps:
        one, two = (statistics.median(taken[name, threads]) for threads in (1, 2))
        table("Two threads' wall time as a share of one thread's").put(
            name, {f"{head} {mode}": f"{two / one:.2f}"}
        )
