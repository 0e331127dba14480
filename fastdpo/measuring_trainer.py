"""MeasuringTrainer: transformers.Trainer whose log and evaluations have DPO's metrics.

Sums stay on the device until they are logged. A training log averages over what ran since the log
before it; an evaluation over its pairs, each counted once and with the same weight, whatever the
batch size, the packs and the number of ranks.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastdpo.batch import PairBatch, TokensRun
from fastdpo.losses import PairLoss
from fastdpo.metrics import (
    MetricSums,
    RunCounts,
    Sums,
    evaluation_metrics,
    pair_metrics,
    tokens_over_ranks,
)
from fastdpo.model import ScoredOutput
from fastdpo.pack_trainer import PackTrainer


class MeasuringTrainer(PackTrainer):
    """Subclasses call count_training or count_evaluation in compute_loss, once for each forward.

    counts: of the current or last training; train() starts from 0. _metrics: numbers that a
    subclass appends to a name's list for "train" or "eval", as under TRL; a log has their mean.
    has_own_loss: whether the subclass computes the loss itself; eval_loss is then transformers'
    average, not the mean over pairs.
    """

    restored_on_retry = ("counts", "_metrics")
    has_own_loss = False

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.counts = RunCounts(self.args.device)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}

    def _inner_training_loop(self, *args, **kwargs):
        """As transformers'; auto_find_batch_size runs it again with smaller batches."""
        self.counts = RunCounts(self.args.device)
        self._metrics["train"].clear()
        return super()._inner_training_loop(*args, **kwargs)

    def count_training(
        self,
        batch: PairBatch,
        scored: ScoredOutput,
        losses: PairLoss,
        tokens: TokensRun,
        aux_loss: Tensor | None,
    ) -> None:
        """Add a forward to this logging interval; `tokens` are those that it ran.

        The CPU does not wait for the device here.
        """
        self.counts.num_train_tokens += batch.num_tokens
        self.counts.tokens += tokens
        metrics = pair_metrics(batch, scored, losses)
        self.counts.train.add(metrics | _aux_metric(aux_loss, batch.num_pairs))

    def count_evaluation(
        self,
        batch: PairBatch,
        scored: ScoredOutput,
        losses: PairLoss,
        aux_loss: Tensor | None,
        num_new: int,
    ) -> None:
        """Add a forward to this evaluation.

        num_new: how many of the batch's pairs are new: all, or 0 where it repeats another rank's.
        """
        self.counts.num_evaluated += num_new
        metrics = evaluation_metrics(batch, scored, losses, num_new)
        self.counts.eval.add(metrics | _aux_metric(aux_loss, num_new))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add an interval's metrics to training's `logs`: the moment that waits for the device, and
        for the other ranks. (A user's log of a loss, without a learning rate, may be one rank's.)
        """
        if logs.keys() >= {"loss", "learning_rate"} or "train_runtime" in logs:
            logs |= self._take("train", self.counts.train)
        if "train_runtime" in logs:  # the dictionary that train() returns, so changed in place
            logs |= tokens_over_ranks(self.counts.tokens, self.accelerator)
        super().log(logs, start_time)

    def _take(self, mode: str, sums: MetricSums) -> dict[str, float]:
        """Means of `sums` and of a subclass's own numbers since the last time, and num_tokens."""
        metrics = sums.take_means(self.accelerator)
        if metrics:  # TRL's last log has none
            num_tokens = self.accelerator.reduce(self.counts.num_train_tokens, "sum")
            metrics["num_tokens"] = num_tokens.item()
        own = self._metrics[mode]
        metrics |= {name: sum(values) / len(values) for name, values in own.items()}
        own.clear()
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, and, where compute_metrics wants them, logits and token ids of every sequence.

        ValueError for those of packed sequences: RowTrainer's loaders have them padded.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            if prediction_loss_only:
                return loss, None, None
            batch = PairBatch.from_inputs(inputs)
            if "tree" in batch.model_inputs:
                raise ValueError(
                    "want batches that are padded where logits are asked for, as the trainer's own "
                    "get_test_dataloader makes them, and get_eval_dataloader with compute_metrics "
                    f"or layout='padded', got layout={self.args.layout!r}'s"
                )
            logits = model(**batch.model_inputs, use_cache=False).logits
        ids_SL = inputs["input_ids"]
        # after the virtual tokens of prompt tuning
        return loss, logits[:, -ids_SL.shape[1] :], ids_SL

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        """As transformers.Trainer's, of evaluations and predictions, with DPO's metrics.

        The loss is a mean over pairs; transformers' would be one over batches for a stream, and
        over rows otherwise.
        """
        own_gather, counts = self.gather_function, self.counts
        self.gather_function = partial(_gather_pairs, own_gather)
        counts.start_evaluation()  # an earlier one may have failed
        self._metrics["eval"].clear()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.gather_function = own_gather
        metrics = self._take("eval", counts.eval)
        if self.has_own_loss and f"{metric_key_prefix}_loss" in output.metrics:
            metrics.pop("loss", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": metrics[name] for name in metrics})
        num_evaluated = torch.tensor(counts.num_evaluated, device=self.args.device)
        num_samples = self.accelerator.reduce(num_evaluated, "sum").item()
        return output._replace(num_samples=num_samples)


def _aux_metric(aux_loss: Tensor | None, num_pairs: int) -> Sums:
    if aux_loss is None:
        return {}
    return {("aux_loss",): (aux_loss.detach() * num_pairs, num_pairs)}


def _gather_pairs(gather: Callable, outputs: Any) -> Any:
    """`outputs` of all ranks, without repeats: accelerate cuts the last batch to its pairs.

    A tensor, or tuples, lists and mappings of tensors: (S, ...), chosen and rejected; or (B,), the
    loss of a batch as many times. With eval_use_gather_object ranks may have rows of other sizes:
    then a list of rows.
    """

    def gathered(x: Tensor) -> Tensor | list[Tensor]:
        parts = [gather(part) for part in (x.chunk(2) if x.ndim > 1 else [x])]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        rows = [row.to(x.device) for part in parts for row in part]
        return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows

    return recursively_apply(gathered, outputs)
