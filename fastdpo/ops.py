"""Triton or plain torch? Decided here and nowhere else: by the device of the tensors.

FASTDPO_DEBUG=1 in the environment makes linear_logps and pair_loss look at what they are given;
that makes the CPU wait for the GPU at each call.
"""

import os
from typing import Any

import torch
from torch import Tensor

from fastdpo.kernels import linear_logps as _linear_logps
from fastdpo.kernels import pair_loss as _pair_loss
from fastdpo.kernels import reference
from fastdpo.kernels.products import HeadRows


def backend_for(device: torch.device) -> str:
    """The backend for `device`: "triton" on CUDA, "torch" elsewhere."""
    return "triton" if device.type == "cuda" else "torch"


@torch.compiler.disable  # a compiler would unroll the walk over the vocabulary; torch 2.11's errs
def linear_logps(
    hidden_ND: Tensor, head_VD: Tensor | HeadRows, labels_N: Tensor, **settings: Any
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """kernels.linear_logps.linear_logps, its tiles folded by what suits the device.

    With FASTDPO_DEBUG=1, a label outside the vocabulary or a hidden state that is not finite is a
    ValueError that names the row; without, it makes its row NaN.
    """
    if os.environ.get("FASTDPO_DEBUG") == "1":
        _check_rows(hidden_ND, head_VD.shape[0], labels_N)
    backend = backend_for(hidden_ND.device)
    return _linear_logps.linear_logps(hidden_ND, head_VD, labels_N, backend=backend, **settings)


def _check_rows(hidden_ND: Tensor, V: int, labels_N: Tensor) -> None:
    outside = ((labels_N < 0) | (labels_N >= V)).nonzero()
    if len(outside):
        n = outside[0].item()
        raise ValueError(f"want labels in [0, {V}), got {labels_N[n].item()} in scored row {n}")
    broken = (~hidden_ND.isfinite().all(1)).nonzero()
    if len(broken):
        n = broken[0].item()
        raise ValueError(f"want finite hidden states, got NaN or Inf in scored row {n} of a batch")


def pair_loss(
    token_logps_C: Tensor, cu_seqlens: Tensor, reference_logps_S: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """kernels.pair_loss.pair_loss on CUDA, kernels.reference.pair_loss elsewhere.

    With one of reference.BATCH_LOSSES among loss_type it is the latter on CUDA too: a few dozen
    small launches in place of one, and still nothing that waits.

    ValueError, on both, for what check_pair_loss refuses, and for cu_seqlens that do not run from 0
    to C: on a CPU always, elsewhere with FASTDPO_DEBUG=1, as the CPU has to wait for them.
    """
    arguments = token_logps_C, cu_seqlens, reference_logps_S
    device = token_logps_C.device
    mixes_pairs = not reference.BATCH_LOSSES.keys().isdisjoint(settings.get("loss_type", ()))
    in_triton = backend_for(device) == "triton" and not mixes_pairs
    if not in_triton:  # the kernel's function checks its arguments itself
        in_torch = {
            "batch_losses": tuple(reference.BATCH_LOSSES),
            "float_dtypes": (torch.float32, torch.float64),
        }
        _pair_loss.check_pair_loss(*arguments, **settings, **in_torch)
    if device.type == "cpu" or os.environ.get("FASTDPO_DEBUG") == "1":
        _check_lengths(cu_seqlens, token_logps_C.numel())
    return (_pair_loss if in_triton else reference).pair_loss(*arguments, **settings)


def _check_lengths(cu_seqlens: Tensor, C: int) -> None:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != C or ends != sorted(ends):
        raise ValueError(f"want cu_seqlens that rise from 0 to {C}, got {ends}")
