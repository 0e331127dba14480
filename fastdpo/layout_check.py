"""Does a model compute the same packed as padded? Checked on one real pair."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from fastdpo.batch import PairBatch
from fastdpo.columns import Pair
from fastdpo.model import causal_lm_of, inference, score

# rms over tokens, in nats: this many roundings of the dtype that the layers compute in
ROUNDINGS, LEAST_TOLERANCE = 12, 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutCheck:
    """One pair, what makes a layout's collator of its name, and the autocast that the run has."""

    pair: Pair
    make_collator: Callable[[str], Callable[[list[Pair]], dict[str, Any]]]
    device: torch.device
    autocast: Callable[[], AbstractContextManager]

    def difference(self, model: nn.Module, layout: str) -> str | None:
        """What `model` computes differently in `layout` than padded; None for nothing.

        Two forwards of one pair; four, to find the layer, where they differ. What fails padded
        fails: that is no layout's doing.
        """
        with inference(model):
            return self._difference(model, self._batch("padded"), self._batch(layout))

    def _difference(self, model: nn.Module, padded: PairBatch, packed: PairBatch) -> str | None:
        name = type(causal_lm_of(model)).__name__
        with self.autocast():
            padded_C = score(model, padded).token_logps_C
            try:
                packed_C = score(model, packed).token_logps_C
            except torch.OutOfMemoryError:  # says nothing of the layout, and padded takes more
                raise
            except (TypeError, ValueError, RuntimeError) as error:
                return f"{name} cannot run it: {error}"
        rms = (padded_C - packed_C).square().mean().sqrt().item()
        if rms <= (tolerance := self._tolerance(model)):  # NaN must not pass
            return None
        return (
            f"{name} gives other log-probabilities than padded, {rms:.2g} nats a token (up to "
            f"{tolerance:.2g} is rounding), from {self._where(model, padded, packed)} on"
        )

    def _batch(self, layout: str) -> PairBatch:
        inputs = self.make_collator(layout)([self.pair])
        return PairBatch.from_inputs(send_to_device(inputs, self.device))

    def _tolerance(self, model: nn.Module) -> float:
        device = self.device.type
        with self.autocast():
            on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return max(LEAST_TOLERANCE, ROUNDINGS * torch.finfo(dtype if on else model.dtype).eps)

    def _where(self, model: nn.Module, padded: PairBatch, packed: PairBatch) -> str:
        """The first layer whose output differs, and its kind."""
        with self.autocast():
            hidden = [self._hidden_states(model, batch) for batch in (padded, packed)]
        config = causal_lm_of(model).config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["attention"] * len(hidden[0])
        far = 4 * self._tolerance(model)  # as a share of the hidden states
        for layer, (padded_CD, packed_CD) in enumerate(zip(*hidden, strict=True)):
            if not (packed_CD - padded_CD).norm() <= far * padded_CD.norm():
                return f"layer {layer - 1} ({kinds[layer - 1]})" if layer else "the embedding"
        return "the head"

    def _hidden_states(self, model: nn.Module, batch: PairBatch) -> list[Tensor]:
        """The output of the embedding and of each layer, at the rows that are scored."""
        causal_lm = causal_lm_of(model)
        outputs = causal_lm.base_model(
            **batch.model_inputs, output_hidden_states=True, use_cache=False
        )
        rows = batch.scored_rows_N
        if batch.completion_rows_C is not None:
            rows = rows[batch.completion_rows_C]
        return [hidden.flatten(0, 1)[rows].float() for hidden in outputs.hidden_states]
