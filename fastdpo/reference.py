"""Whose log-probabilities the policy's are held against, in order of cost.

    RowLogps        they stand in the rows: nothing runs
    AdaptersOff     the policy without its adapters, or with a frozen copy of them
    FrozenModel     a second model

`choose_reference` picks one. Each answers `logps(policy, batch, ld_alpha) -> (S,)` and says in
`source` what it is. ld_alpha weighs tokens as losses.completion_logps says, None for all alike;
what stands in the rows is taken as it is.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from fastdpo.batch import PairBatch
from fastdpo.collate import REFERENCE_COLUMNS
from fastdpo.losses import completion_logps
from fastdpo.model import attach_scorer, frozen_token_logps

REFERENCE_ADAPTER = "fastdpo_reference"  # a name that no adapter of the user's will have


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

    def _as_before(self) -> contextlib.AbstractContextManager:
        if REFERENCE_ADAPTER not in self.peft_model.peft_config:
            return _adapters_off(self.peft_model)
        return _reference_adapter_on(self.peft_model)


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """A model that is not trained, on the device of its inputs."""

    model: nn.Module
    source: str

    def logps(self, policy: nn.Module, batch: PairBatch, ld_alpha: float | None = None) -> Tensor:
        return _frozen_logps(self.model, batch, ld_alpha)


@dataclass(frozen=True, slots=True)
class RowLogps:
    """ref_chosen_logps and ref_rejected_logps of the rows; `others` scores rows without them."""

    source: str = "log-probabilities in the rows"
    others: AdaptersOff | FrozenModel | None = None

    def logps(self, policy: nn.Module, batch: PairBatch, ld_alpha: float | None = None) -> Tensor:
        if batch.reference_logps_S is not None:
            return batch.reference_logps_S
        if self.others is None:
            raise ValueError(
                f"want {' and '.join(REFERENCE_COLUMNS)} in every row, got a batch without: the "
                f"reference ({self.source}) is not there to score it"
            )
        return self.others.logps(policy, batch, ld_alpha)


Reference = RowLogps | AdaptersOff | FrozenModel


@torch.no_grad()
def _frozen_logps(model: nn.Module, batch: PairBatch, ld_alpha: float | None) -> Tensor:
    if batch.reference_logps_S is not None:
        raise ValueError(
            "want one reference, got log-probabilities in the rows, as the training rows have none"
        )
    return completion_logps(frozen_token_logps(model, batch), batch.cu_seqlens, ld_alpha)


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of `policy` as it is now, in evaluation mode, that no optimizer will change."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def _copy_trained_adapter(policy: PeftModel) -> None:
    """Keep the policy's trained adapter, as it is now, as a second one that is not trained.

    It takes the place of an earlier trainer's on the same model, and is saved beside the trained
    one, as checkpoints need it.
    """
    trained = policy.active_adapter
    with _as_trained(policy):
        if REFERENCE_ADAPTER not in policy.peft_config:
            policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[trained])
    parameters = dict(policy.named_parameters())
    for name, parameter in parameters.items():
        if f".{trained}." in name:
            twin = parameters[name.replace(f".{trained}.", f".{REFERENCE_ADAPTER}.")]
            twin.data.copy_(parameter.data)
            twin.requires_grad_(False)


def load_trained_adapter(policy: nn.Module, checkpoint: str) -> None:
    """Load what `checkpoint` has of the trained adapter, if the policy has a reference adapter too.

    PEFT writes an adapter called "default" into the checkpoint's folder, any other into one of its
    own; transformers 5.17 resumes from either the one or the others, 5.23 from both.
    """
    names = policy.peft_config if isinstance(policy, PeftModel) else ()
    if REFERENCE_ADAPTER in names and "default" in names:
        with _as_trained(policy):
            policy.load_adapter(checkpoint, "default", is_trainable=True)


@contextlib.contextmanager
def _adapters_off(policy: PeftModel) -> Iterator[None]:
    """As PeftModel.disable_adapter, without its report on each layer: 11 of 26 ms, at 24 layers."""
    policy.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        policy.base_model.enable_adapter_layers()


@contextlib.contextmanager
def _reference_adapter_on(policy: PeftModel) -> Iterator[None]:
    with _as_trained(policy):
        policy.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        yield


@contextlib.contextmanager
def _as_trained(policy: PeftModel) -> Iterator[None]:
    """Afterwards the same adapter is active as before, and the same parameters are trained."""
    active = policy.active_adapter
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        policy.set_adapter(active, inference_mode=True)  # else what its owner froze would train
        for parameter in trained:
            parameter.requires_grad_(True)


def choose_reference(
    policy: nn.Module,
    ref_model: PreTrainedModel | PeftModel | None,
    *,
    in_rows: bool,
    has_new_adapters: bool,
    precompute: bool,
    device: torch.device,
) -> Reference:
    """The cheapest reference that these rows, models and adapters have, on `device`.

    in_rows: whether the rows have log-probabilities. has_new_adapters: that change nothing yet, so
    that the policy without them is the reference. precompute: it is asked before training alone.
    ValueError where the rows and ref_model are two.
    """
    if in_rows and ref_model is not None:
        raise ValueError(f"want one reference, got ref_model and {REFERENCE_COLUMNS} in the rows")
    if in_rows:
        return RowLogps()
    if ref_model is not None:
        return _placed(ref_model.requires_grad_(False).eval(), "ref_model", device)
    if isinstance(policy, PeftModel):
        if not has_new_adapters:
            _copy_trained_adapter(policy)
        return AdaptersOff(policy)
    if precompute:
        return FrozenModel(policy, "the policy before training")
    return _placed(frozen_copy(policy), "a frozen copy of the policy", device)


def _placed(model: nn.Module, source: str, device: torch.device) -> FrozenModel:
    attach_scorer(model)
    if getattr(model, "hf_device_map", None) is None:
        model.to(device)
    return FrozenModel(model, source)


def are_scored(datasets: Mapping[str, Dataset | IterableDataset]) -> bool:
    """Whether the rows of all data sets have reference log-probabilities.

    ValueError where those of some have them and others' do not.
    """
    required = set(REFERENCE_COLUMNS)
    scored = [name for name, rows in datasets.items() if required <= set(rows.column_names)]
    others = [name for name in datasets if name not in scored]
    if scored and others:
        raise ValueError(
            f"want {' and '.join(REFERENCE_COLUMNS)} in all data sets or in none, got them in "
            f"{', '.join(scored)} and not in {', '.join(others)}"
        )
    return bool(scored)


def once_precomputed(reference: Reference, policy: nn.Module) -> RowLogps:
    """What `reference` is when it has scored all rows, and is there for new ones if it remains."""
    is_gone = isinstance(reference, FrozenModel) and reference.model is policy
    source = f"{reference.source}, all rows scored before training"
    return RowLogps(source, None if is_gone else reference)


def with_reference_logps(
    dataset: Dataset | IterableDataset,
    *,
    reference_logps: Callable[[PairBatch], Tensor],
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
