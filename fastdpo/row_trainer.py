"""RowTrainer: transformers.Trainer that takes preference rows, at the start and in evaluate() and
predict(), and lays all of them out alike."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from fastdpo.collate import PackedCollator, PaddedCollator, make_collator
from fastdpo.columns import ID_COLUMNS, REFERENCE_COLUMNS
from fastdpo.config import DPOConfig
from fastdpo.data import prepare_pairs
from fastdpo.layout import Layout
from fastdpo.measuring_trainer import MeasuringTrainer
from fastdpo.packs import BudgetCollator
from fastdpo.pair_check import check_pairs
from fastdpo.row_report import PairCounts
from fastdpo.rows import Rows
from fastdpo.sampler import SeededByEpoch, WholeStream

OWN_COLLATORS = (PaddedCollator, PackedCollator, BudgetCollator)
CUSTOM_LAYOUT = Layout("custom", "as your data_collator lays a batch out")


class RowTrainer(MeasuringTrainer):
    """Subclasses set `layout` and `pair_counts`.

    layout: CUSTOM_LAYOUT where the user brought a data_collator. pair_counts: what became of
    each dataset's rows, by its name; None of a stream.
    """

    layout: Layout
    pair_counts: dict[str, PairCounts | None]

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self._rows_of_loaders: dict[str, Rows] = {}  # of evaluations' loaders, by their names

    def models(self) -> dict[str, nn.Module]:
        """What scores pairs, by its argument's name."""
        return {"model": self.model}

    def _make_pairs(
        self, dataset: Rows, name: str, tokenizer: PreTrainedTokenizerBase, args: DPOConfig
    ) -> Rows:
        """`dataset` as token ids, counted. The constructor has it before there is a self.args."""
        settings = args.data_settings
        if name != "train":
            settings["keep_columns"] = True  # callbacks such as TRL's generate from its prompts
        pairs, self.pair_counts[name] = prepare_pairs(dataset, tokenizer, name=name, **settings)
        return pairs

    def _prepare(self, dataset: Rows, name: str) -> Rows:
        """`dataset` as token ids, counted and checked against the models."""
        pairs = self._make_pairs(dataset, name, self.processing_class, self.args)
        check_pairs({name: pairs}, self.models().values(), self.args)
        return pairs

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededByEpoch(sampler, seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> None:
        """None: in the rows' own order, as predictions are to be. (transformers would group them by
        length, too.)"""
        return None

    def _set_signature_columns_if_needed(self):
        columns = [*ID_COLUMNS, *REFERENCE_COLUMNS, self.args.length_column]
        self._signature_columns = [name for name in columns if name is not None]

    def _remove_unused_columns(self, dataset, description=None):
        pairs = super()._remove_unused_columns(dataset, description)
        # a collator written for TRL joins lists with +, which would add arrays element by element
        if not isinstance(pairs, Dataset) or not isinstance(self.data_collator, OWN_COLLATORS):
            return pairs
        return pairs.with_format("numpy", columns=[*ID_COLUMNS], output_all_columns=True)

    def _get_dataloader(
        self, dataset: Rows, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        if isinstance(dataset, IterableDataset) and self.accelerator.num_processes > 1:
            dataset = WholeStream(dataset)
        held = [*self.accelerator._dataloaders]
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if not is_training:  # accelerate would hold each evaluation's loader, and its workers
            self.accelerator._dataloaders = held
        return loader

    def get_eval_dataloader(self, eval_dataset: Rows | str | None = None) -> DataLoader:
        """As transformers.Trainer's; padded where compute_metrics wants each sequence's logits."""
        with self._collating_for_logits(self.compute_metrics is not None):
            self._forget_other_loader(eval_dataset)
            return super().get_eval_dataloader(eval_dataset)

    def _forget_other_loader(self, eval_dataset) -> None:
        """With persistent workers, transformers keeps loaders by name, even once other rows go by
        that name."""
        if not self.args.dataloader_persistent_workers:
            return
        loaders = getattr(self, "_eval_dataloaders", {})  # transformers', from the first on
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[name] if isinstance(rows, str) else rows
        is_its = self._rows_of_loaders.get(name) is rows
        if name in loaders and not (is_its and loaders[name].collate_fn == self.data_collator):
            del loaders[name]
        self._rows_of_loaders[name] = rows

    def get_test_dataloader(self, test_dataset: Rows) -> DataLoader:
        """As transformers.Trainer's, of preference rows; padded, as predictions are logits."""
        with self._collating_for_logits(True):
            return super().get_test_dataloader(self._prepare(test_dataset, "test"))

    def _collating_for_logits(self, wanted: bool) -> AbstractContextManager:
        wanted = wanted and self.layout is not CUSTOM_LAYOUT
        return self.collating_with(self._make_collator("padded") if wanted else None)

    def _make_collator(self, layout: str) -> PaddedCollator | PackedCollator:
        pad_token_id = self.processing_class.pad_token_id
        return make_collator(layout, pad_token_id=pad_token_id, **self.args.collator_settings)

    def evaluate(
        self,
        eval_dataset: Rows | dict[str, Rows] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As transformers.Trainer's; rows passed here are prepared as those of the constructor.

        (transformers comes back here with each dataset of a dictionary.)
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict):
            eval_dataset = self._prepare(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def map_datasets(
    function: Callable[[Rows, str], Rows], eval_dataset: Rows | dict[str, Rows] | None
) -> Rows | dict[str, Rows] | None:
    """`function` of a dataset and its name, or of each in a dictionary, by the names of by_name."""
    if isinstance(eval_dataset, dict):
        return {key: function(each, f"eval_{key}") for key, each in eval_dataset.items()}
    return None if eval_dataset is None else function(eval_dataset, "eval")


def by_name(eval_dataset: Rows | dict[str, Rows] | None) -> dict[str, Rows]:
    """`eval_dataset`, or each of a dictionary's, by the name that errors have for it."""
    if isinstance(eval_dataset, dict):
        return {f"eval_{key}": each for key, each in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval": eval_dataset}
