"""Whose log-probabilities the policy's are held against, in order of cost.

    RowLogps        they stand in the rows: nothing runs
    AdaptersOff     the policy without its adapters, or with a frozen copy of them
    FrozenModel     a second model

Each answers `logps(policy, batch, ld_alpha) -> (S,)` and says in `source` what it is. ld_alpha
weighs tokens as losses.completion_logps says, None for all alike; what stands in the rows is
taken as it is.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastdpo.batch import PairBatch
from fastdpo.collate import REFERENCE_COLUMNS
from fastdpo.losses import completion_logps
from fastdpo.model import frozen_token_logps

REFERENCE_ADAPTER = "ref"


@dataclass(frozen=True, slots=True)
class RowLogps:
    """ref_chosen_logps and ref_rejected_logps of the rows."""

    source: str = "log-probabilities in the rows"

    def logps(self, policy: nn.Module, batch: PairBatch, ld_alpha: float | None = None) -> Tensor:
        if batch.reference_logps_S is None:
            raise ValueError(
                "want ref_chosen_logps and ref_rejected_logps in every row, as the training rows "
                "have them (or precompute_ref_log_probs put them there), got a batch without"
            )
        return batch.reference_logps_S


@dataclass(frozen=True, slots=True)
class AdaptersOff:
    """`peft_model`, which is or is inside the policy, as it was before training."""

    peft_model: PeftModel

    @property
    def source(self) -> str:
        if REFERENCE_ADAPTER in self.peft_model.peft_config:
            return "a frozen copy of the policy's adapters"
        return "the policy with its adapters switched off"

    def logps(self, policy: nn.Module, batch: PairBatch, ld_alpha: float | None = None) -> Tensor:
        with self._as_before():
            return _frozen_logps(policy, batch, ld_alpha)

    @contextlib.contextmanager
    def _as_before(self) -> Iterator[None]:
        if REFERENCE_ADAPTER not in self.peft_model.peft_config:
            with self.peft_model.disable_adapter():
                yield
            return
        trained = self.peft_model.active_adapter
        self.peft_model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        try:
            yield
        finally:
            self.peft_model.set_adapter(trained)


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """A model that is not trained, on the device of its inputs."""

    model: nn.Module
    source: str

    def logps(self, policy: nn.Module, batch: PairBatch, ld_alpha: float | None = None) -> Tensor:
        return _frozen_logps(self.model, batch, ld_alpha)


def _frozen_logps(model: nn.Module, batch: PairBatch, ld_alpha: float | None) -> Tensor:
    return completion_logps(frozen_token_logps(model, batch), batch.cu_seqlens, ld_alpha)


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of `policy` as it is now, in evaluation mode, that no optimizer will change."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def add_reference_adapter(policy: PeftModel) -> None:
    """Keep the policy's trained adapter, as it is now, as a second one that is not trained."""
    trained = policy.active_adapter
    policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[trained])
    parameters = dict(policy.named_parameters())
    for name, parameter in parameters.items():
        if f".{trained}." in name:
            twin = parameters[name.replace(f".{trained}.", f".{REFERENCE_ADAPTER}.")]
            twin.data.copy_(parameter.data)
    policy.set_adapter(trained)


def with_reference_logps(
    dataset: Dataset,
    reference_logps: Callable[[PairBatch], Tensor],
    *,
    collator: Callable,
    batch_size: int,
    accelerator: Accelerator,
) -> Dataset:
    """`dataset` with ref_chosen_logps and ref_rejected_logps of every pair, scored over all ranks.

    ValueError for a streamed dataset, which has no place to keep them.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "want a map-style dataset with precompute_ref_log_probs=True, got a streamed one"
        )
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    scored = []
    for inputs in accelerator.prepare(loader):
        logps_S = reference_logps(PairBatch.from_inputs(inputs))
        # without the rows that were added to even the ranks out
        scored.append(torch.stack(accelerator.gather_for_metrics(logps_S.chunk(2))).cpu())
    for name, logps_B in zip(REFERENCE_COLUMNS, torch.cat(scored, 1), strict=True):
        dataset = dataset.add_column(name, logps_B.tolist())
    return dataset
