"""A reference that follows the policy: TR-DPO, arXiv:2404.09656.

    reference <- alpha * policy + (1 - alpha) * reference, after every ref_model_sync_steps updates

A checkpoint holds the reference, too: a resumed run goes on with the one that it had.
"""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from fastdpo.config import DPOConfig
from fastdpo.reference_logps import FrozenModel, Reference

FILE = "reference.safetensors"


class FollowPolicy(TrainerCallback):
    """Moves the parameters of `reference` that it does not have in common with the policy.

    ValueError for adapters, whose mean is not that of what they do, for a reference that is no
    model of its own with the policy's parameters, and for weights in pieces.
    """

    def __init__(self, policy: nn.Module, reference: Reference, *, is_sharded: bool):
        if isinstance(policy, PeftModel) or is_sharded:
            got = "FSDP or DeepSpeed" if is_sharded else "adapters"
            raise ValueError(
                f"want full fine-tuning of whole weights with sync_ref_model, got {got}"
            )
        if not isinstance(reference, FrozenModel):
            raise ValueError(f"want a reference model with sync_ref_model, got {reference.source}")
        policys = dict(policy.named_parameters())
        references = dict(reference.model.named_parameters())
        one, other = ({(n, p.shape) for n, p in each.items()} for each in (policys, references))
        if one != other:
            name, _ = min(one ^ other)
            raise ValueError(
                "want a ref_model with the model's parameters with sync_ref_model, got one that "
                f"differs in {name}"
            )
        self._policys = {n: p for n, p in policys.items() if p is not references[n]}
        self._references = {name: references[name] for name in self._policys}

    @torch.no_grad()
    def on_step_end(self, args: DPOConfig, state, control, **_):
        if state.global_step % args.ref_model_sync_steps == 0:
            alpha = args.ref_model_mixup_alpha
            for name, parameter in self._references.items():
                parameter.mul_(1 - alpha).add_(self._policys[name], alpha=alpha)

    def save(self, checkpoint: str) -> None:
        """Write the reference into the folder of a checkpoint."""
        tensors = {name: each.detach().contiguous() for name, each in self._references.items()}
        save_file(tensors, Path(checkpoint, FILE))

    @torch.no_grad()
    def load(self, checkpoint: str) -> None:
        """Go on with the reference of a checkpoint; ValueError where it has none, or another."""
        path = Path(checkpoint, FILE)
        tensors = load_file(path) if path.exists() else {}
        if tensors.keys() != self._references.keys():
            got = "others" if tensors else "none"
            raise ValueError(f"want the reference's parameters in {path}, got {got}")
        for name, parameter in self._references.items():
            parameter.copy_(tensors[name])
