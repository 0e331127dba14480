"""ResumingTrainer: transformers.Trainer that goes on from a checkpoint as if it had not stopped."""

from pathlib import Path

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import Trainer


class ResumingTrainer(Trainer):
    """A PEFT model's adapters are loaded whatever their names, to resume and as the best model; a
    run that had all its updates resumes to none."""

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

    def _run_epoch(self, *args, **kwargs):
        """Nothing where max_steps are done: transformers would run an update before it looks."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_best_model(self):
        if self._has_whole_adapters:
            _load_adapters(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


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
