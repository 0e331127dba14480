"""ResumingTrainer: transformers.Trainer that goes on from a checkpoint as if it had not stopped."""

import math
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftConfig, PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from fastdpo.following_reference import FILE, FollowPolicy

logger = logging.get_logger(__name__)


class ResumingTrainer(Trainer):
    """Restores what transformers.Trainer would not, to resume and as the best model: adapters,
    whatever their names and whoever put them there, and weights stored under other names than the
    model's (experts).

    A finished run resumes without another update, a stream in the pass it was in, and every sampler
    gets the epoch. follower: what moves the reference of TR-DPO, which checkpoints then hold.
    """

    follower: FollowPolicy | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed is on: weights may be sharded."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._try_to_load(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _try_to_load(self, checkpoint: str) -> bool:
        """Load a checkpoint of which transformers would leave out some, with a warning; False, and
        nothing loaded, for one that it loads whole, or that is sharded."""
        if self.is_sharded:
            return False
        if isinstance(self.model, PeftModel):
            _load_adapters(self.model, checkpoint)
            return True
        if getattr(self.model, "_hf_peft_config_loaded", False):  # by its add_adapter
            _load_own_adapter(self.model, checkpoint)
            return True
        if _names_in(checkpoint).issubset(self.model.state_dict()):
            return False
        _load_renamed(self.model, checkpoint)
        return True

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        """Epochs trained, and batches to skip in the next.

        A stream has no length: transformers takes every pass for one of max_steps updates, and
        would skip the updates of all passes in the first.
        """
        trained, skipped = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and isinstance(self.train_dataset, IterableDataset):
            saved = TrainerState.load_from_json(f"{resume_from_checkpoint}/{TRAINER_STATE_NAME}")
            trained = max(math.ceil(saved.epoch) - 1, 0)
            updates = round((saved.epoch - trained) * saved.max_steps)
            skipped = updates * self.args.gradient_accumulation_steps if skipped else 0
        return trained, skipped

    def _run_epoch(
        self, *, epoch: int, epochs_trained: int, train_dataloader: DataLoader, **others: Any
    ):
        """Nothing where max_steps are done: transformers would run an update before it looks.

        ValueError after a whole pass over a stream that was too short for an update.
        """
        before = self.state.global_step
        if before >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        _set_epoch(train_dataloader.batch_sampler, epoch)
        super()._run_epoch(
            epoch=epoch, epochs_trained=epochs_trained, train_dataloader=train_dataloader, **others
        )
        is_stopped = self.control.should_training_stop or self.control.should_epoch_stop
        is_whole = epoch > epochs_trained  # the first pass of a resumed run may be a rest
        if is_whole and self.state.global_step == before and not is_stopped:
            raise ValueError(
                "want a stream with batches for gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps}, got fewer in a whole pass"
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.follower and self.args.should_save:
            self.follower.save(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """As transformers.Trainer's, and waits for all ranks: next, the main one alone writes what
        marks the checkpoint as whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.follower:
            self.follower.load(checkpoint)
        elif Path(checkpoint, FILE).exists():
            logger.warning(f"{FILE} in {checkpoint} is not read, as sync_ref_model is off")

    def _load_best_model(self):
        if not self._try_to_load(self.state.best_model_checkpoint):
            super()._load_best_model()
        if self.follower:
            self.follower.load(self.state.best_model_checkpoint)


def _set_epoch(sampler: Any, epoch: int) -> None:
    """Tell `sampler`, and those it draws from, the epoch.

    (The loader that resumes within an epoch, on several ranks, would not tell the innermost one.)
    """
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def _names_in(checkpoint: str) -> set[str]:
    """The weights' names in a checkpoint's safetensors, of one file or several; none in others."""
    names: set[str] = set()
    for file in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def _load_renamed(policy: PreTrainedModel, checkpoint: str) -> None:
    """Load weights through `from_pretrained`, which knows what a model's were called on the Hub.

    ValueError where some are missing.
    """
    dtypes = {weight.dtype for weight in policy.state_dict().values() if weight.is_floating_point()}
    loaded, found = type(policy).from_pretrained(
        checkpoint, dtype=reduce(torch.promote_types, dtypes), output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"want all weights in checkpoint {checkpoint}, got none for {missing[:3]}")
    policy.load_state_dict(loaded.state_dict())


def _load_adapters(policy: PeftModel, checkpoint: str) -> None:
    """Load the weights of every adapter; which are active, trained or frozen does not change.

    PEFT writes the adapter "default" into the checkpoint's folder, others into folders of their
    name. (transformers would resume only the first active one, and find none for the best model.)
    ValueError where an adapter is missing, or not whole.
    """
    for name, config in policy.peft_config.items():
        if has_encoder(config):
            raise ValueError(
                f"want an adapter that checkpoints hold whole, got {config.peft_type.value}: "
                f"{checkpoint} has the virtual tokens, and not the encoder that they come from"
            )
        folder = Path(checkpoint, "" if name == "default" else name)
        if not any(folder.glob("adapter_model.*")):
            raise ValueError(f"want adapter {name!r} in checkpoint {checkpoint}, got none")
        set_peft_model_state_dict(policy, load_peft_weights(str(folder)), adapter_name=name)


def has_encoder(config: PeftConfig | None) -> bool:
    """Whether an encoder that trains makes the virtual tokens: PEFT saves those alone."""
    is_ptuning = getattr(config, "peft_type", None) == PeftType.P_TUNING
    return is_ptuning or getattr(config, "prefix_projection", False)


def _load_own_adapter(policy: PreTrainedModel, checkpoint: str) -> None:
    """Load the adapter that transformers put on a model, and saved: the active one."""
    [name] = policy.active_adapters()
    weights = load_peft_weights(checkpoint)
    weights = {key.removeprefix("base_model.model."): each for key, each in weights.items()}
    set_peft_model_state_dict(policy, weights, adapter_name=name)
