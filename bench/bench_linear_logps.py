"""How much dearer than the bare product is a head's log-probability, forward and backward?

    pytest bench/bench_linear_logps.py -s                 real models' heads, minutes
    pytest bench/bench_linear_logps.py -m "not slow"      one tiny head, seconds

Every way is held against float64 first, and a wrong one is not timed. A row of the table it prints:
median time as a multiple of `hidden @ head.T` into a preallocated output, taken in turns with it
(CPU time with one thread, wall time with more); memory at its peak beyond what was there before
and the gradients; rms and largest error of the log-probabilities, in nats. Skipped rows say why.
"""

import importlib.util
import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastdpo import ops
from fastdpo.kernels import reference

HEADS = {  # N completion tokens, D hidden size, V vocabulary
    "tiny": (64, 32, 4099),
    "SmolLM2-360M-like": (512, 512, 49152),
    "Llama-2-like": (1024, 1024, 32000),
    "Qwen2.5-0.5B": (256, 896, 151936),
}
MODES = ("forward", "frozen", "trained")
ROUNDS = 3
CHECKED = 64  # rows held against float64


def fastdpo(hidden_ND, head_VD, labels_N):
    return ops.linear_logps(hidden_ND, head_VD, labels_N, head_cache_bytes=1 << 30)


def fastdpo_uncached(hidden_ND, head_VD, labels_N):
    return ops.linear_logps(hidden_ND, head_VD, labels_N, head_cache_bytes=0)


compiled_reference = torch.compile(reference.linear_logps, dynamic=False)


def compiled(hidden_ND, head_VD, labels_N):
    return compiled_reference(hidden_ND, head_VD, labels_N)


def torch_plain(hidden_ND, head_VD, labels_N):
    return -F.linear_cross_entropy(hidden_ND, head_VD, labels_N, reduction="none")


def torch_chunked(hidden_ND, head_VD, labels_N):
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden_ND, head_VD, labels_N, reduction="none", options=options)


def trl(hidden_ND, head_VD, labels_N):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    return ChunkedLogProbFunction.apply(
        hidden_ND, head_VD, None, labels_N, 1.0, columns, None, 1.0, ()
    )[0]


def liger(hidden_ND, head_VD, labels_N):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden_ND, head_VD, labels_N, reduction="none")


def cut_cross_entropy(hidden_ND, head_VD, labels_N):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden_ND, head_VD, labels_N, reduction="none")


WAYS = {
    "fastdpo": fastdpo,
    "fastdpo, no cache": fastdpo_uncached,
    "naive": reference.linear_logps,
    "torch.compile of naive": compiled,
    "torch linear_cross_entropy": torch_plain,
    "torch linear_cross_entropy, chunked": torch_chunked,
    "TRL ChunkedLogProbFunction": trl,
    "Liger fused linear cross entropy": liger,
    "Cut Cross-Entropy": cut_cross_entropy,
}


def reason_to_skip(way, mode):
    if way == "fastdpo, no cache" and mode != "trained":
        return "only a trained head keeps tiles"
    module = {"TRL": "trl", "Liger": "liger_kernel", "Cut": "cut_cross_entropy"}.get(
        way.replace("-", " ").split()[0]
    )
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if module in ("liger_kernel", "cut_cross_entropy") and not torch.cuda.is_available():
        return f"{way} is written in Triton for a GPU, and there is none"
    return None


def inputs(N, D, V):
    torch.manual_seed(0)
    hidden_ND, head_VD = torch.randn(N, D), torch.randn(V, D) / D**0.5
    return hidden_ND, head_VD, torch.randint(0, V, (N,))


def step(way, mode, hidden_ND, head_VD, labels_N):
    """Log-probabilities, and gradients of their sum."""
    hidden_ND = hidden_ND.detach().requires_grad_(mode != "forward")
    head_VD = head_VD.detach().requires_grad_(mode == "trained")
    logps_N = WAYS[way](hidden_ND, head_VD, labels_N)
    if mode != "forward":
        logps_N.sum().backward()
    return logps_N.detach(), hidden_ND.grad, head_VD.grad


def seconds(function):
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def in_products(way, mode, hidden_ND, head_VD, labels_N):
    """Median time as a multiple of the bare product's, in turns."""
    out_NV, products, ways = torch.zeros(len(hidden_ND), len(head_VD)), [], []
    for _ in range(ROUNDS):
        products.append(seconds(lambda: torch.mm(hidden_ND, head_VD.T, out=out_NV)))
        ways.append(seconds(lambda: step(way, mode, hidden_ND, head_VD, labels_N)))
    return statistics.median(ways) / statistics.median(products)


def peak_mib(function):
    """Resident memory at its peak beyond that before and the result's; NaN where not Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = status("VmRSS")
    made = function()
    gradients = sum(x.nbytes for x in made[1:] if x is not None) / 2**20
    return status("VmHWM") - before - gradients


def errors(way, mode, hidden_ND, head_VD, labels_N):
    """rms and largest error of some log-probabilities; fails where they or dhidden are wrong."""
    logps_N, dhidden_ND, _ = step(way, mode, hidden_ND, head_VD, labels_N)
    some_ND = hidden_ND[:CHECKED].double().requires_grad_()
    truth_N = reference.linear_logps(some_ND, head_VD.double(), labels_N[:CHECKED])
    truth_N.sum().backward()
    error_N = logps_N[:CHECKED] - truth_N.detach()
    assert error_N.abs().max() < 1e-4
    if dhidden_ND is not None:
        assert (dhidden_ND[:CHECKED] - some_ND.grad).abs().max() < 1e-4 * some_ND.grad.abs().max()
    return error_N.square().mean().sqrt().item(), error_N.abs().max().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "head", [pytest.param(name, marks=[] if name == "tiny" else pytest.mark.slow) for name in HEADS]
)
def test_linear_logps(benchmark, head, mode, way):
    if reason := reason_to_skip(way, mode):
        pytest.skip(reason)
    args = inputs(*HEADS[head])
    rms, largest = errors(way, mode, *args)
    ratio = in_products(way, mode, *args)
    peak = peak_mib(lambda: step(way, mode, *args))
    found = {"products": ratio, "peak_mib": peak, "rms": rms, "max": largest}
    benchmark.extra_info |= found | {"threads": torch.get_num_threads()}
    print(f"\n| {head} | {mode} | {way} | {ratio:.2f} | {peak:.0f} | {rms:.1e} | {largest:.1e} |")
    benchmark.pedantic(step, (way, mode, *args), rounds=1)
