"""Tolerances made from the data."""

import torch
from torch import Tensor


def assert_as_accurate(kernel: Tensor, same_dtype: Tensor, truth: Tensor, times: float = 2) -> None:
    """`kernel` strays from float64 `truth` at most `times` as far as PyTorch in its own dtype."""
    kernel, same_dtype = kernel.detach(), same_dtype.detach()
    if truth.numel() == 0:
        assert kernel.shape == truth.shape
        return
    one_rounding = torch.finfo(kernel.dtype).eps * truth.abs().max()
    allowed = times * ((same_dtype - truth).abs().max() + one_rounding)
    error = (kernel - truth).abs().max()
    assert error <= allowed, f"error {error:.1e}, allowed {allowed:.1e}"
