"""Random hidden states, heads and labels."""

import torch


def inputs(shape, dtype, device="cpu", bias=False, seed=0):
    N, D, V = shape
    random = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=random)
    head_VD = torch.randn(V, D, generator=random)
    labels_N = torch.randint(0, V, (N,), generator=random)
    bias_V = torch.randn(V, generator=random).to(device, dtype) if bias else None
    return hidden_ND.to(device, dtype), head_VD.to(device, dtype), labels_N.to(device), bias_V
