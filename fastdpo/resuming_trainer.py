"""ResumingTrainer: transformers.Trainer that goes on from a checkpoint as if it had not stopped."""

import math
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME


class ResumingTrainer(Trainer):
    """A PEFT model's adapters are loaded whatever their names, to resume and as the best model; a
    run that had all its updates resumes to none; every sampler is told the epoch; a stream goes on
    in the pass that it was in."""

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed is on: weights may be in pieces."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _has_whole_adapters(self) -> bool:
        return isinstance(self.model, PeftModel) and not self.is_sharded

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._has_whole_adapters:
            _load_adapters(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

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

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **others: Any):
        """Nothing where max_steps are done: transformers would run an update before it looks."""
        if self.state.global_step < self.state.max_steps:
            _set_epoch(train_dataloader.batch_sampler, epoch)
            super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **others)
        else:
            self.control.should_training_stop = True

    def _load_best_model(self):
        if self._has_whole_adapters:
            _load_adapters(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def _set_epoch(sampler: Any, epoch: int) -> None:
    """Tell `sampler`, and those it draws from, the epoch.

    (The loader that resumes within an epoch, on several ranks, would not tell the innermost one.)
    """
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def _load_adapters(policy: PeftModel, checkpoint: str) -> None:
    """Load the weights of every adapter; which are active, trained or frozen does not change.

    PEFT writes the adapter "default" into the checkpoint's folder, others into folders of their
    name. (transformers would resume only the first active one, and find none for the best model.)
    ValueError where an adapter is missing.
    """
    for name in policy.peft_config:
        folder = Path(checkpoint, "" if name == "default" else name)
        if not any(folder.glob("adapter_model.*")):
            raise ValueError(f"want adapter {name!r} in checkpoint {checkpoint}, got none")
        set_peft_model_state_dict(policy, load_peft_weights(str(folder)), adapter_name=name)
