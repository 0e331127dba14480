"""Triton or plain torch? Decided here and nowhere else: by the device of the tensors."""

import torch
from torch import Tensor

from fastdpo.kernels import linear_logps as _linear_logps
from fastdpo.kernels import pair_loss as _pair_loss
from fastdpo.kernels import reference


def implementation(device: torch.device) -> str:
    """ "triton" on a CUDA device, "torch" on any other."""
    return "triton" if device.type == "cuda" else "torch"


def linear_logps(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, **settings):
    """kernels.linear_logps.linear_logps, its tiles folded by what suits the device."""
    fold = implementation(hidden_ND.device)
    return _linear_logps.linear_logps(hidden_ND, head_VD, labels_N, fold=fold, **settings)


def pair_loss(token_logps_C: Tensor, cu_seqlens: Tensor, reference_logps_S: Tensor, **settings):
    """kernels.pair_loss.pair_loss on CUDA, kernels.reference.pair_loss elsewhere."""
    on_gpu = implementation(token_logps_C.device) == "triton"
    chosen = _pair_loss.pair_loss if on_gpu else reference.pair_loss
    return chosen(token_logps_C, cu_seqlens, reference_logps_S, **settings)
