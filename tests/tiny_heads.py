"""Random hidden states, heads and labels, and what a head makes of them."""

import torch
from numerics import assert_as_accurate

from fastdpo.kernels.row_statistics import STATS


def inputs(shape, dtype, device="cpu", bias=False, seed=0):
    N, D, V = shape
    random = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=random)
    head_VD = torch.randn(V, D, generator=random)
    labels_N = torch.randint(0, V, (N,), generator=random)
    bias_V = torch.randn(V, generator=random).to(device, dtype) if bias else None
    return hidden_ND.to(device, dtype), head_VD.to(device, dtype), labels_N.to(device), bias_V


def run(function, hidden_ND, head_VD, labels_N, bias_V, dtype, trained=True, **settings):
    """Value, gradients of a weighted sum, and statistics, with the inputs in `dtype`."""
    leaves = {"hidden": hidden_ND, "head": head_VD} | ({} if bias_V is None else {"bias": bias_V})
    leaves = {name: x.to(dtype).detach().clone() for name, x in leaves.items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(trained or name == "hidden")
    token_logps_N, stats = function(
        leaves["hidden"],
        leaves["head"],
        labels_N,
        bias_V=leaves.get("bias"),
        stats=STATS,
        **settings,
    )
    assert not any(each_N.requires_grad for each_N in stats.values())
    weights_N = torch.arange(
        1.0, len(labels_N) + 1, device=labels_N.device, dtype=token_logps_N.dtype
    )
    (token_logps_N * weights_N).sum().backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"token_logps": token_logps_N.detach()} | grads | stats


def assert_all_as_accurate(ours, same_dtype, truth, times):
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        if exact.dtype == torch.bool:
            assert torch.equal(ours[name], exact), name
        elif name in ("entropy", "mean_logit", "log_sum_p2"):
            # small numbers made of thousands of logits, which are rounded at their own size
            largest = truth["lse"].abs().max() if exact.numel() else 1.0
            torch.testing.assert_close(ours[name].double(), exact, rtol=0, atol=5e-6 * largest)
        else:
            assert_as_accurate(ours[name], same_dtype[name], exact, times)
