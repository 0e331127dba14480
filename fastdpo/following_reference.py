"""A reference that follows the policy: TR-DPO, arXiv:2404.09656.

    reference <- alpha * policy + (1 - alpha) * reference, after every ref_model_sync_steps updates

A checkpoint holds the reference, too: a resumed run goes on with the one that it had.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from fastdpo.config import DPOConfig
from fastdpo.model import has_adapters
from fastdpo.reference_logps import FrozenModel, Reference

FILE = "reference.pt"  # .safetensors of the policy's names would be taken for the policy's

logger = logging.get_logger(__name__)


class FollowPolicy(TrainerCallback):
    """Moves the parameters of `reference` that it does not have in common with the policy.

    ValueError for adapters, whose mean is not that of what they do, for a reference that is not
    a model of its own with the policy's parameters, and for sharded weights.
    """

    def __init__(self, policy: nn.Module, reference: Reference, *, is_sharded: bool):
        if isinstance(policy, PeftModel) or has_adapters(policy) or is_sharded:
            got = "FSDP or DeepSpeed" if is_sharded else "adapters"
            raise ValueError(
                f"want full fine-tuning of whole weights with sync_ref_model, got {got}"
            )
        if not isinstance(reference, FrozenModel):
            raise ValueError(f"want a reference model with sync_ref_model, got {reference.source}")
        one, other = (
            {(name, each.shape) for name, each in model.named_parameters()}
            for model in (policy, reference.model)
        )
        if one != other:
            name, _ = min(one ^ other)
            raise ValueError(
                "want a ref_model with the model's parameters with sync_ref_model, got one that "
                f"differs in {name}"
            )
        self._policy, self._reference = policy, reference.model

    def _moving(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Name, the policy's and the reference's, of what they do not have in common."""
        theirs = dict(self._reference.named_parameters())
        for name, ours in self._policy.named_parameters():
            if ours is not theirs[name]:
                yield name, ours, theirs[name]

    @torch.no_grad()
    def on_step_end(self, args: DPOConfig, state, control, **_):
        if state.global_step % args.ref_model_sync_steps == 0:
            alpha = args.ref_model_mixup_alpha
            for _, ours, theirs in self._moving():
                theirs.mul_(1 - alpha).add_(ours, alpha=alpha)

    def save(self, checkpoint: str) -> None:
        """Write the reference into the folder of a checkpoint."""
        torch.save(
            {name: theirs.detach() for name, _, theirs in self._moving()}, Path(checkpoint, FILE)
        )

    @torch.no_grad()
    def load(self, checkpoint: str) -> None:
        """Go on with the reference of a checkpoint; where it has none, with a warning, as it is.

        ValueError where it is another model's.
        """
        path = Path(checkpoint, FILE)
        if not path.exists():
            logger.warning(f"no reference in {checkpoint}: it starts from ref_model or model again")
            return
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        moving = {name: theirs for name, _, theirs in self._moving()}
        if tensors.keys() != moving.keys():
            raise ValueError(f"want the reference's parameters in {path}, got others")
        for name, theirs in moving.items():
            theirs.copy_(tensors[name])
