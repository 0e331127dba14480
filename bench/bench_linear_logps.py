"""How much dearer than the bare product is a head's log-probability, forward and backward?

    pytest bench/bench_linear_logps.py                  real models' heads, minutes
    pytest bench/bench_linear_logps.py -m "not slow"    one tiny head, seconds

Every way is held against float64 first, and a wrong one is not timed. `products` is its time as
a multiple of `hidden @ head.T`, into a preallocated output, taken in turns with it.
"""

import statistics
import time

import pytest
import torch

from fastdpo import ops
from fastdpo.kernels import reference

HEADS = {  # N completion tokens, D hidden size, V vocabulary
    "tiny": (64, 32, 4099),
    "SmolLM2-360M-like": (512, 512, 49152),
    "Llama-2-like": (1024, 1024, 32000),
    "Qwen2.5-0.5B": (256, 896, 151936),
}
WAYS = {"fastdpo": ops.linear_logps, "naive": reference.linear_logps}
HEAD_CACHE_BYTES = 1 << 30


def inputs(N, D, V):
    torch.manual_seed(0)
    hidden_ND, head_VD = torch.randn(N, D), torch.randn(V, D) / D**0.5
    return hidden_ND, head_VD, torch.randint(0, V, (N,))


def step(way, hidden_ND, head_VD, labels_N, trained):
    """Log-probabilities, and gradients of their sum."""
    hidden_ND = hidden_ND.detach().requires_grad_()
    head_VD = head_VD.detach().requires_grad_(trained)
    settings = {"head_cache_bytes": HEAD_CACHE_BYTES} if way == "fastdpo" else {}
    logps_N = WAYS[way](hidden_ND, head_VD, labels_N, **settings)
    logps_N.sum().backward()
    return logps_N.detach(), hidden_ND.grad, head_VD.grad


def seconds(function, rounds):
    """CPU seconds of each round, all threads together."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return taken


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "head", [pytest.param(name, marks=[] if name == "tiny" else pytest.mark.slow) for name in HEADS]
)
def test_linear_logps(benchmark, head, way, trained):
    hidden_ND, head_VD, labels_N = inputs(*HEADS[head])
    truth_N = reference.linear_logps(hidden_ND[:8].double(), head_VD.double(), labels_N[:8])
    logps_N, *_ = step(way, hidden_ND, head_VD, labels_N, trained)
    assert (logps_N[:8] - truth_N).abs().max() < 1e-4

    out_NV = torch.empty(len(hidden_ND), len(head_VD))
    products, ways = [], []
    for _ in range(3):
        products += seconds(lambda: torch.mm(hidden_ND, head_VD.T, out=out_NV), 1)
        ways += seconds(lambda: step(way, hidden_ND, head_VD, labels_N, trained), 1)
    ratio = statistics.median(ways) / statistics.median(products)
    benchmark.extra_info |= {"products": ratio, "threads": torch.get_num_threads()}
    print(f"\n{head} {'trained' if trained else 'frozen'} {way}: {ratio:.2f} products")
    benchmark.pedantic(step, (way, hidden_ND, head_VD, labels_N, trained), rounds=1)
