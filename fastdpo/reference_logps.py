"""Where the reference's log-probabilities come from, cheapest first.

    RowLogps        the rows have them: nothing runs
    AdaptersOff     the policy without its new adapters
    FrozenModel     a second model, or a copy of what trains in the policy

`make_reference` picks one. Each has `logps(policy, batch, ld_alpha) -> (S,)` and a `source`, which
describes it; models also `cache(...)`, what they gave in earlier runs (reference_cache.open_cache).
ld_alpha weighs tokens as kernels.reference.completion_sums does, None weighs all alike;
log-probabilities in the rows are taken as they are.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.batch import PairBatch
from fastdpo.columns import REFERENCE_COLUMNS, Cut
from fastdpo.kernels.reference import completion_sums
from fastdpo.model import attach_scorer, causal_lm_of, token_logps_without_grad
from fastdpo.reference_cache import ReferenceCache, open_cache


@dataclass(frozen=True, slots=True)
class AdaptersOff:
    """The policy without its adapters.

    peft_model: the policy, or what its wrappers hold. frozen: the parameters that are then left.
    """

    peft_model: PeftModel
    frozen: tuple[nn.Parameter, ...]
    source: str = "the policy with its adapters switched off"

    def logps(self, policy: nn.Module, batch: PairBatch, ld_alpha: float | None = None) -> Tensor:
        with _adapters_off(self.peft_model):
            return _frozen_logps(policy, batch, ld_alpha)

    def cache(self, cut: Cut, probe_logps_S: Tensor, **settings: Any) -> ReferenceCache | None:
        return open_cache(self.peft_model, cut, probe_logps_S, adapters_off=True, **settings)


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """A model that is not trained, on the device of its inputs."""

    model: nn.Module
    source: str

    def logps(self, policy: nn.Module, batch: PairBatch, ld_alpha: float | None = None) -> Tensor:
        return _frozen_logps(self.model, batch, ld_alpha)

    def cache(self, cut: Cut, probe_logps_S: Tensor, **settings: Any) -> ReferenceCache | None:
        return open_cache(self.model, cut, probe_logps_S, adapters_off=False, **settings)


@dataclass(frozen=True, slots=True)
class RowLogps:
    """ref_chosen_logps and ref_rejected_logps of the rows; for_others scores rows without."""

    source: str = "log-probabilities in the rows"
    for_others: AdaptersOff | FrozenModel | None = None

    def logps(self, policy: nn.Module, batch: PairBatch, ld_alpha: float | None = None) -> Tensor:
        if batch.reference_logps_S is not None:
            return batch.reference_logps_S
        if self.for_others is None:
            raise ValueError(
                f"want {' and '.join(REFERENCE_COLUMNS)} in every row, got a batch without: the "
                f"reference ({self.source}) is not there to score it; precompute_ref_log_probs "
                "scores train_dataset and eval_dataset as the constructor gets them"
            )
        return self.for_others.logps(policy, batch, ld_alpha)


Reference = RowLogps | AdaptersOff | FrozenModel


def scorer_of(reference: Reference) -> AdaptersOff | FrozenModel | None:
    """What scores rows without log-probabilities."""
    return reference.for_others if isinstance(reference, RowLogps) else reference


def _frozen_logps(model: nn.Module, batch: PairBatch, ld_alpha: float | None) -> Tensor:
    if batch.reference_logps_S is not None:
        raise ValueError(
            f"want rows without {' and '.join(REFERENCE_COLUMNS)}, as the training rows have none, "
            "got a batch with them"
        )
    return completion_sums(token_logps_without_grad(model, batch), batch.cu_seqlens, ld_alpha)


@contextlib.contextmanager
def _adapters_off(policy: PeftModel) -> Iterator[None]:
    """Without virtual tokens; or without adapters, by the flag that their forward looks at.

    PeftModel.disable_adapter visits every weight, twice (30 ms at 24 layers, where this takes 5),
    and what was frozen of an adapter comes out of it trainable.
    """
    if policy.active_peft_config.is_prompt_learning:
        with policy.disable_adapter():
            yield
        return
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [module for module in policy.modules() if isinstance(module, kinds)]
    before = [layer.disable_adapters for layer in layers]
    _set_disabled(layers, [True] * len(layers))
    try:
        yield
    finally:
        _set_disabled(layers, before)


def _set_disabled(layers: list[nn.Module], values: list[bool]) -> None:
    for layer, value in zip(layers, values, strict=True):
        layer._disable_adapters = value
        assert layer.disable_adapters is value  # or PEFT has another flag by now


def _adapters_alone_train(policy: PeftModel) -> bool:
    """Whether nothing trains that stays on when the adapters are off (LoRA's `bias` does)."""
    with policy.disable_adapter():  # within, PEFT has requires_grad off for the adapters' weights
        return not any(each.requires_grad for each in causal_lm_of(policy).parameters())


def _base_was_changed(policy: PeftModel) -> bool:
    """Whether new adapters took something out of the weights below them, as PiSSA's do."""
    at_start = getattr(policy.active_peft_config, "init_lora_weights", True)
    return isinstance(at_start, str) and at_start not in ("gaussian", "eva", "orthogonal")


def frozen_copy(policy: nn.Module, *, share_frozen: bool = True) -> nn.Module:
    """A copy of `policy` as it is now, in evaluation mode, that no optimizer will change.

    share_frozen: parameters that are not trained are shared with `policy`, not copied.
    """
    tensors = []
    if share_frozen:
        tensors += (parameter for parameter in policy.parameters() if not parameter.requires_grad)
        tensors += policy.buffers()
        # a bitsandbytes layer moves its weight's scales there in its first forward
        states = (getattr(module, "state", None) for module in policy.modules())
        tensors += (state for state in states if hasattr(state, "SCB"))
    return copy.deepcopy(policy, {id(each): each for each in tensors}).requires_grad_(False).eval()


def once_training(policy: nn.Module, reference: Reference) -> Reference:
    """The reference to train with, which must not follow the policy.

    Where something trains that the reference has too, rows that are scored keep their
    log-probabilities and no others are scored; ValueError where none are.
    """
    scorer = scorer_of(reference)
    if scorer is None:
        return reference
    own = scorer.frozen if isinstance(scorer, AdaptersOff) else scorer.model.parameters()
    trained = {parameter for parameter in policy.parameters() if parameter.requires_grad}
    shared = trained.intersection(own)
    if shared and isinstance(reference, RowLogps):
        return RowLogps(reference.source)
    if shared:
        raise ValueError(
            "want what trains to have requires_grad before DPOTrainer is made, which shares the "
            f"rest with its reference, got {len(shared)} parameters that were frozen then"
        )
    return reference


def make_reference(
    policy: nn.Module,
    ref_model: PreTrainedModel | PeftModel | None,
    *,
    in_rows: bool,
    has_new_adapters: bool,
    precompute: bool,
    is_sharded: bool,
    device: torch.device,
) -> Reference:
    """The cheapest reference that these rows, models and adapters have, on `device`.

    in_rows: whether the rows have log-probabilities. has_new_adapters: whether the policy's are
    new, so that without them it is the reference. precompute: whether it is needed only before
    training. is_sharded: whether the policy's weights will be sharded, so that the reference
    cannot share any. ValueError if both the rows and ref_model provide a reference.
    """
    if in_rows and ref_model is not None:
        raise ValueError(f"want one reference, got ref_model and {REFERENCE_COLUMNS} in the rows")
    if in_rows:
        return RowLogps()
    if ref_model is not None:
        return _placed(ref_model.eval(), "ref_model", device)
    if has_new_adapters and _adapters_alone_train(policy) and not _base_was_changed(policy):
        frozen = tuple(each for each in policy.parameters() if not each.requires_grad)
        return AdaptersOff(policy, frozen)
    if precompute:
        return FrozenModel(policy, "the policy before training")
    copied = frozen_copy(policy, share_frozen=not is_sharded)
    return _placed(copied, "a frozen copy of the policy", device)


def _placed(model: nn.Module, source: str, device: torch.device) -> FrozenModel:
    attach_scorer(model)
    if getattr(model, "hf_device_map", None) is None:
        model.to(device)
    return FrozenModel(model, source)
