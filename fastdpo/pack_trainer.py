"""PackTrainer: transformers.Trainer that runs a training batch in packs of bounded size.

Each pack's loss is its share of the update's, so that gradients add up to those of the whole batch,
and are reduced over ranks once. (A load-balancing loss of experts is each pack's own, as it is each
microbatch's.) When memory runs out in a forward or a backward of the only process, the update is
run again in smaller packs; with several, one rank alone could not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from fastdpo.batch import count_pairs
from fastdpo.packs import PackCollator, TokenBudget

logger = logging.get_logger(__name__)

Batch = dict[str, Any]


class PackTrainer(Trainer):
    """Subclasses set `budget`, None for whole batches, and may keep count of what an update did.

    compute_loss sees one pack at a time. One with is_filler is run for the number of forwards
    alone, which DDP and FSDP want alike on every rank: its loss must weigh nothing.
    """

    budget: TokenBudget | None = None

    def remember_metrics(self) -> None:
        """An update starts; forget_update may have to come back to here."""

    def before_packs(self, model: nn.Module, packs: list[Batch]) -> list[Batch]:
        """A batch's packs as compute_loss is to see them, alike in number on every rank."""
        return packs

    def forget_update(self) -> None:
        """What this update did so far is void: drop its gradients."""
        self.model.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def get_train_dataloader(self):
        if self.budget is None:
            return super().get_train_dataloader()
        self._pack_collator = PackCollator(self.data_collator, self.budget)
        with self.collating_with(self._pack_collator):
            return super().get_train_dataloader()

    @contextlib.contextmanager
    def collating_with(self, collator: Callable | None) -> Iterator[None]:
        """Data loaders made within use `collator`; None for the trainer's own."""
        own = self.data_collator
        self.data_collator = collator or own
        try:
            yield
        finally:
            self.data_collator = own

    def to_device(self, inputs: Batch) -> Batch:
        """`inputs` where a data loader would have put them."""
        return send_to_device(inputs, self.args.device)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one update, and how many pairs they hold together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_pairs = sum(count_pairs(inputs) for inputs in batches)
        if self.budget is not None:
            self._done: list[Batch] = []  # batches of this update
            self.remember_metrics()
            self._even_out(batches)
        return batches, num_pairs

    def _even_out(self, batches: list[Batch]) -> None:
        """Give each batch as many packs as it has on the rank where it has most."""
        if self.accelerator.num_processes == 1:
            return
        counts = torch.tensor([len(inputs["packs"]) for inputs in batches], device=self.args.device)
        of_ranks = self.accelerator.gather(counts).view(-1, len(batches))
        for inputs, count in zip(batches, of_ranks.amax(0).tolist(), strict=True):  # a wait
            if len(inputs["packs"]) < count:
                anew = self._pack_collator(inputs["rows"].rows, at_least=count)
                inputs |= self.to_device(anew)
            filler = inputs["packs"][-1] | {"is_filler": True}
            inputs["packs"] += [filler] * (count - len(inputs["packs"]))

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: int | None = None
    ) -> Tensor:
        """The batch's loss, after a forward and a backward of each of its packs."""
        step = functools.partial(
            super().training_step, model, num_items_in_batch=num_items_in_batch
        )
        if self.budget is None:
            return step(inputs)
        run = functools.partial(self._run_packs, step, model)
        batches = [inputs]
        while (losses := self._attempt(run, batches)) is None:
            # not in the handler, where the error would still hold what it failed with
            self.forget_update()
            batches = [*self._done, inputs]
        self._done.append(inputs)
        return losses[-1]

    def _attempt(self, run: Callable[[Batch], Tensor], batches: list[Batch]) -> list[Tensor] | None:
        """Each batch's loss; None where memory ran out and the budget could shrink."""
        try:
            return [run(inputs) for inputs in batches]
        except torch.OutOfMemoryError:
            packs = [pack for inputs in batches for pack in self._fitting(inputs)["packs"]]
            if self.accelerator.num_processes > 1 or not self.budget.shrink(packs):
                raise
            logger.warning(
                "out of memory: the update is run again, with at most "
                f"{self.budget.max_tokens:,} tokens in a forward"
            )
            return None

    def _run_packs(
        self, step: Callable[[Batch], Tensor], model: nn.Module, inputs: Batch
    ) -> Tensor:
        packs, losses = self.before_packs(model, self._fitting(inputs)["packs"]), []
        for i, pack in enumerate(packs):
            is_last = i == len(packs) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(step(pack))
        return torch.stack(losses).sum()

    def _fitting(self, inputs: Batch) -> Batch:
        """`inputs`, laid out anew where the budget has shrunk since they were made."""
        if all(map(self.budget.fits, inputs["packs"])):
            return inputs
        return self.to_device(self._pack_collator(inputs["rows"].rows))

    def floating_point_ops(self, inputs: Batch) -> int:
        """As transformers.Trainer's, of all packs."""
        packs = inputs.get("packs", [inputs])
        return sum(super(PackTrainer, self).floating_point_ops(pack) for pack in packs)
