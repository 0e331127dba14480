"""DPO the way everyone writes it first: chosen and rejected padded together, float32 logits.

No gradient checkpointing, which would only slow it down. The reference is the policy with its
adapters switched off, or a frozen copy.
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from bench.length_profiles import Pair


def padded(pairs: list[Pair], pad_id: int, end_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and completion_mask (2B, L): chosen first, rejected after."""
    ids, is_completion = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            prompt_ids, completion_ids = pair["prompt_ids"], [*pair[side], end_id]
            ids.append(torch.tensor(prompt_ids + completion_ids))
            is_completion.append(torch.tensor([0] * len(prompt_ids) + [1] * len(completion_ids)))
    return {
        "input_ids": pad_sequence(ids, True, pad_id),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], True, 0),
        "completion_mask": pad_sequence(is_completion, True, 0),
    }


def sequence_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """logps_S: the summed log-probability of each completion, float32 (2B,)."""
    input_ids_SL = batch["input_ids"]
    logits_SLV = model(
        input_ids=input_ids_SL, attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    logps_SLV = logits_SLV[:, :-1].float().log_softmax(-1)
    logps_SL = logps_SLV.gather(2, input_ids_SL[:, 1:, None]).squeeze(2)
    return (logps_SL * batch["completion_mask"][:, 1:]).sum(1)


class NaiveLoop:
    """One optimizer step at a time; `log` holds each step's loss.

    optimizer: a function of the parameters that train. autocast: bfloat16 products.
    """

    def __init__(
        self,
        policy: nn.Module,
        batches: list[list[Pair]],
        *,
        optimizer,
        beta: float,
        max_grad_norm: float,
        autocast: bool,
        pad_id: int,
        end_id: int,
    ):
        self.log: list[dict[str, float]] = []
        self._policy, self._batches = policy, iter(batches)
        self._reference = policy
        if not isinstance(policy, PeftModel):
            self._reference = copy.deepcopy(policy).requires_grad_(False)
        self._trained = [p for p in policy.parameters() if p.requires_grad]
        self._optimizer = optimizer(self._trained)
        self._beta, self._max_grad_norm, self._autocast = beta, max_grad_norm, autocast
        self._pad_id, self._end_id = pad_id, end_id

    def step(self) -> None:
        batch = padded(next(self._batches), self._pad_id, self._end_id)
        device = next(self._policy.parameters()).device
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            with torch.no_grad(), self._adapters_off():
                reference_logps_S = sequence_logps(self._reference, batch)
            logps_S = sequence_logps(self._policy, batch)
        chosen_logratio_B, rejected_logratio_B = (logps_S - reference_logps_S).chunk(2)
        loss = -F.logsigmoid(self._beta * (chosen_logratio_B - rejected_logratio_B)).mean()
        loss.backward()
        clip_grad_norm_(self._trained, self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.log.append({"loss": loss.item()})

    def _adapters_off(self):
        if isinstance(self._reference, PeftModel):
            return self._reference.disable_adapter()
        return contextlib.nullcontext()

    def close(self) -> None:
        """Nothing to end: a contender as SteppedTrainer is."""
