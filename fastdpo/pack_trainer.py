"""PackTrainer: transformers.Trainer that runs each training batch in packs of bounded size.

A pack's loss is its share of the whole update's, so that the accumulated gradients are those of the
whole batch; ranks reduce them once.

With a budget of "auto", memory that runs out in a forward or a backward makes it half of the
largest pack that can be split, and the update runs again from its first batch. Under DDP all ranks
must do so, and a rank that waits in a collective cannot be told. So packs run under no_sync; after
each batch the ranks agree on a budget (one number, which the CPU waits for), and gradients are
averaged once no rank has failed. The price is that wait, and a reduction that does not overlap with
the last backward. Not recoverable: memory that runs out within these collectives, and a single pair
that does not fit, which ends the run on all ranks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.utils import logging

from fastdpo.batch import PairBatch, count_pairs
from fastdpo.collate import first_pairs_longest_first
from fastdpo.config import DPOConfig
from fastdpo.model import score
from fastdpo.packs import BudgetCollator
from fastdpo.policy import forget_trainer
from fastdpo.ranks import average_gradients, least_of_ranks
from fastdpo.token_budget import UNBOUNDED, TokenBudget, half_of_largest, tokens_that_fit
from fastdpo.update_start import UpdateStart

logger = logging.get_logger(__name__)

Inputs = dict[str, Any]  # a collator's dictionary, of a batch or of a pack: batch.py
DDP_TYPES = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class PackTrainer(Trainer):
    """Subclasses set `restored_on_retry` and `loss_is_scaled_for_ga`.

    restored_on_retry: names of the attributes that compute_loss adds to; an update that starts
    again restores them, and the random state. loss_is_scaled_for_ga: as in transformers.Trainer,
    whether compute_loss divides by the pairs of the whole update.

    compute_loss is called with one pack at a time and must have no collective of its own, as ranks
    may have different numbers of packs. A pack with is_filler runs only because FSDP needs the same
    number of forwards on every rank: its loss must be 0.
    """

    restored_on_retry: tuple[str, ...] = ()

    def __init__(self, *, args: DPOConfig, **arguments: Any):
        if args.max_tokens_per_forward is not None:  # ranks may have different numbers of forwards
            if args.ddp_broadcast_buffers:
                raise ValueError(
                    "want ddp_broadcast_buffers unset with max_tokens_per_forward="
                    f"{args.max_tokens_per_forward!r}, got True"
                )
            args.ddp_broadcast_buffers = False
        super().__init__(args=args, **arguments)
        self.budget = self._choose_budget()  # None for whole batches
        self._done_batches: list[Inputs] = []  # of the current update
        self._start: UpdateStart | None = None  # of it, before its first batch
        self._left_over = 0  # pairs that a stream's pass left to the next update, already run

    def before_packs(self, model: nn.Module, packs: list[Inputs]) -> list[Inputs]:
        """Hook: a batch's packs as compute_loss is to see them, as many as came."""
        return packs

    def _choose_budget(self) -> TokenBudget | None:
        """What max_tokens_per_forward asks for; "auto" is measured when training starts.

        ValueError under DeepSpeed, where every backward reduces gradients, and for "auto" under
        FSDP, whose forwards are collective: a rank without memory cannot leave one.
        """
        args = self.args
        wanted = args.max_tokens_per_forward
        if wanted is None:
            return None
        if self.is_deepspeed_enabled:
            raise ValueError(f"want max_tokens_per_forward unset under DeepSpeed, got {wanted!r}")
        if wanted != "auto":
            return TokenBudget(wanted)
        if self.is_fsdp_enabled:
            raise ValueError("want max_tokens_per_forward as a number under FSDP, got 'auto'")
        return TokenBudget(may_shrink=True)

    def _inner_training_loop(self, *args, **kwargs):
        """Measures the "auto" budget first: only now has transformers set up checkpointing, which
        decides what fits."""
        if self.budget is not None and self.budget.may_shrink:
            most = least_of_ranks(self._tokens_that_fit(), self.accelerator)
            self.budget.max_tokens = most
            logger.info(f"max_tokens_per_forward: at most {most:,} tokens in a forward")
        self._left_over = 0
        if self.accelerator.distributed_type in DDP_TYPES:
            # an evaluation before has marked the model as prepared: DDP would not wrap it any more,
            # and ranks would share no gradients
            forget_trainer(self.model)
        return super()._inner_training_loop(*args, **kwargs)

    def _tokens_that_fit(self) -> int:
        """Estimated from a forward and backward of 1, 2, 4, … of the first pairs, longest first."""
        pairs = first_pairs_longest_first(self.train_dataset)
        counts = [2**i for i in range(len(pairs).bit_length())]
        probes = [self.to_device(self.data_collator(pairs[:count])) for count in counts]
        buckets = 0 if self.accelerator.num_processes == 1 else 1  # DDP's, as large as gradients
        kept_bytes = sum(
            parameter.numel() * (buckets * parameter.element_size() + 8)  # and Adam's moments
            for parameter in self.model.parameters()
            if parameter.requires_grad
        )
        try:
            return tokens_that_fit(self._run_once, probes, self.args.device, kept_bytes=kept_bytes)
        finally:
            self.model.zero_grad()

    def _run_once(self, inputs: Inputs) -> None:
        """A training forward and backward, whose gradients stay beside those before."""
        self.model.train()
        with self.accelerator.autocast():  # the model is not wrapped yet
            batch = PairBatch.from_inputs(inputs)
            scored = score(self.model, batch, stats=self.args.token_stats)
        scored.token_logps_C.sum().backward()

    def get_train_dataloader(self):
        if self.budget is None:
            return super().get_train_dataloader()
        with self.collating_with(self._pack_collator):
            return super().get_train_dataloader()

    @property
    def _pack_collator(self) -> BudgetCollator:
        return BudgetCollator(self.data_collator, self.budget)

    @contextlib.contextmanager
    def collating_with(self, collator: Callable | None) -> Iterator[None]:
        """Data loaders made within use `collator`; None for the trainer's own."""
        own = self.data_collator
        self.data_collator = collator or own
        try:
            yield
        finally:
            self.data_collator = own

    def to_device(self, inputs: Inputs) -> Inputs:
        """`inputs` where a data loader would have put them."""
        return send_to_device(inputs, self.args.device, non_blocking=self.accelerator.non_blocking)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one update, and how many pairs they hold together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.budget is not None and not all("packs" in inputs for inputs in batches):
            raise ValueError(
                "want max_tokens_per_forward unset with a get_train_dataloader of your own, or its "
                f"loader made by super(), got {self.args.max_tokens_per_forward!r}"
            )
        num_pairs = sum(count_pairs(inputs) for inputs in batches)
        if batches:
            num_pairs = self._pairs_of_update(num_pairs, num_batches - len(batches))
        if self.args.train_sampling_strategy == "batch_rebalance":  # ranks have unequal numbers
            counts = torch.tensor(float(num_pairs), device=self.args.device)
            num_pairs = self.accelerator.reduce(counts, "mean").item()  # DDP averages over ranks
        self._done_batches = []
        if batches and self.budget is not None and self.forwards_are_collective():
            self._equalise_counts(batches)
        return batches, num_pairs

    def _pairs_of_update(self, num_pairs: int, num_missing: int) -> int:
        """num_pairs, and those that are in the same update before or after these batches.

        num_missing: batches that these are short of an update, at the end of a pass over a stream.
        Its last batches then join the first update of the next pass, which begins with whole ones.
        """
        before, self._left_over = self._left_over, num_pairs if num_missing else 0
        if not num_missing:
            return before + num_pairs
        full_batch = self.args.over_ranks(self._train_batch_size) // self.args.world_size
        return num_pairs + self.args.gradient_accumulation_steps * full_batch

    def forwards_are_collective(self) -> bool:
        """Whether ranks need as many forwards each: FSDP's gather weights, those of DDP do not."""
        is_ddp = isinstance(self.model_wrapped, DistributedDataParallel)
        return self.accelerator.num_processes > 1 and not is_ddp

    def _equalise_counts(self, batches: list[Inputs]) -> None:
        """Give each batch as many packs as it has on the rank with the most."""
        counts = torch.tensor([len(inputs["packs"]) for inputs in batches], device=self.args.device)
        of_ranks = self.accelerator.gather(counts).view(-1, len(batches))
        for inputs, count in zip(batches, of_ranks.amax(0).tolist(), strict=True):  # a wait
            if len(inputs["packs"]) < count:
                self._lay_out_again(inputs, at_least=count)
            filler = inputs["packs"][-1] | {"is_filler": True}
            inputs["packs"] += [filler] * (count - len(inputs["packs"]))

    def _lay_out_again(self, inputs: Inputs, at_least: int = 1) -> None:
        inputs |= self.to_device(self._pack_collator(inputs["pairs"].pairs, at_least))

    def training_step(
        self, model: nn.Module, inputs: Inputs, num_items_in_batch: int | None = None
    ) -> Tensor:
        """The batch's loss, after a forward and a backward of each of its packs."""
        if num_items_in_batch is None and self.loss_is_scaled_for_ga:
            # a subclass has left it out: each batch of the update weighs the same
            num_items_in_batch = count_pairs(inputs) * self.current_gradient_accumulation_steps
        step = functools.partial(
            super().training_step, model, num_items_in_batch=num_items_in_batch
        )
        if self.budget is None:
            return step(inputs)
        run = functools.partial(self._run_packs, step, model)
        if not self.budget.may_shrink:
            return run(inputs)
        return self._run_until_it_fits(run, model, inputs)

    def _run_until_it_fits(
        self, run: Callable[[Inputs], Tensor], model: nn.Module, inputs: Inputs
    ) -> Tensor:
        """The batch's loss; while memory runs out, the update starts again from its first batch."""
        if not self._done_batches:
            self._start = UpdateStart(self, self.restored_on_retry)
        with self.accelerator.no_sync(model):
            losses = self._attempt(run, [inputs])
            while losses is None:
                # not in _attempt's handler, where the error would still hold what it failed with
                self._start.restore()
                losses = self._attempt(run, [*self._done_batches, inputs])
        self._done_batches.append(inputs)
        if self.accelerator.sync_gradients:  # the last batch of the update
            average_gradients(self.model.parameters(), self.accelerator)
        return losses[-1]

    def _run_packs(
        self, step: Callable[[Inputs], Tensor], model: nn.Module, inputs: Inputs
    ) -> Tensor:
        packs, losses = self.before_packs(model, inputs["packs"]), []
        for i, pack in enumerate(packs):
            is_last = i == len(packs) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(step(pack))
        return torch.stack(losses).sum()

    def _attempt(
        self, run: Callable[[Inputs], Tensor], batches: list[Inputs]
    ) -> list[Tensor] | None:
        """Each batch's loss; None where memory ran out on a rank, and all have shrunk the budget.

        torch.OutOfMemoryError where it could not shrink.
        """
        for inputs in batches:
            if not all(map(self.budget.fits, inputs["packs"])):  # made before it shrank
                self._lay_out_again(inputs)
        losses, needed = None, UNBOUNDED
        try:
            losses = [run(inputs) for inputs in batches]
        except torch.OutOfMemoryError:
            needed = half_of_largest([pack for inputs in batches for pack in inputs["packs"]])
            if not needed:
                least_of_ranks(needed, self.accelerator)  # lets the others end
                raise
        needed = least_of_ranks(needed, self.accelerator)
        if needed == UNBOUNDED:
            return losses
        if not needed:
            raise torch.OutOfMemoryError("out of memory on another rank, for a single pair")
        self.budget.max_tokens = needed
        logger.warning(
            f"out of memory: the update is run again, with at most {needed:,} tokens in a forward"
        )
        return None

    def floating_point_ops(self, inputs: Inputs) -> int:
        """As transformers.Trainer's, of all packs; it counts the parameters at every call."""
        packs = inputs.get("packs", [inputs])
        return 6 * self._num_parameters * sum(pack["input_ids"].numel() for pack in packs)

    @functools.cached_property
    def _num_parameters(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)
