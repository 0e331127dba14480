"""RowTrainer: transformers.Trainer of preference rows, whenever they come, and of one layout."""

from contextlib import AbstractContextManager

from datasets import Dataset
from torch import nn

from fastdpo.collate import (
    ID_COLUMNS,
    REFERENCE_COLUMNS,
    PackedCollator,
    PaddedCollator,
    make_collator,
)
from fastdpo.data import prepare_pairs
from fastdpo.layout import Layout
from fastdpo.measuring_trainer import MeasuringTrainer
from fastdpo.pair_check import check_pairs
from fastdpo.row_report import PairCounts
from fastdpo.rows import Rows

COLLATORS_LAYOUT = Layout("its own", "what the data_collator makes of a batch")


class RowTrainer(MeasuringTrainer):
    """Subclasses set `layout`, and before any rows come `args`, `processing_class`, `pair_counts`.

    layout: COLLATORS_LAYOUT where the user brought a data_collator. pair_counts: what became of
    each dataset's rows, by its name; None of a stream, whose rows are not counted.
    """

    layout: Layout
    pair_counts: dict[str, PairCounts | None]

    def models(self) -> dict[str, nn.Module]:
        """What scores pairs, by its argument's name."""
        return {"model": self.model}

    def _prepare(self, dataset: Rows | dict[str, Rows], name: str) -> Rows | dict[str, Rows]:
        """`dataset` as token ids, its rows counted under `name`; token ids stay as they are."""
        if isinstance(dataset, dict):
            return {key: self._prepare(each, f"{name}_{key}") for key, each in dataset.items()}
        pairs, self.pair_counts[name] = prepare_pairs(
            dataset, self.processing_class, name=name, **self.args.data_settings
        )
        return pairs

    def _prepare_new(self, dataset: Rows | dict[str, Rows], name: str) -> Rows | dict[str, Rows]:
        """As _prepare, for rows that come once the models are loaded: checked against them too."""
        pairs = self._prepare(dataset, name)
        check_pairs(by_name(pairs, name), self.models().values(), self.args)
        return pairs

    def _set_signature_columns_if_needed(self):
        columns = [*ID_COLUMNS, *REFERENCE_COLUMNS, self.args.length_column]
        self._signature_columns = [name for name in columns if name is not None]

    def _remove_unused_columns(self, dataset, description=None):
        pairs = super()._remove_unused_columns(dataset, description)
        # a collator written for TRL adds lists up, which arrays would take for a sum
        if not isinstance(pairs, Dataset) or self.layout is COLLATORS_LAYOUT:
            return pairs
        return pairs.with_format("numpy", columns=[*ID_COLUMNS], output_all_columns=True)

    def get_eval_dataloader(self, eval_dataset=None):
        """As transformers.Trainer's; padded where compute_metrics wants each sequence's logits."""
        with self._collating_for_logits(self.compute_metrics is not None):
            self._forget_other_loader(eval_dataset)
            return super().get_eval_dataloader(eval_dataset)

    def _forget_other_loader(self, eval_dataset) -> None:
        """With persistent workers, transformers keeps loaders by name, whatever they are of."""
        loaders = getattr(self, "_eval_dataloaders", {})
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        is_own = eval_dataset is None or isinstance(eval_dataset, str)
        if name in loaders and not (is_own and loaders[name].collate_fn is self.data_collator):
            del loaders[name]

    def get_test_dataloader(self, test_dataset):
        """As transformers.Trainer's, of preference rows; padded, as predictions are logits."""
        with self._collating_for_logits(True):
            return super().get_test_dataloader(self._prepare_new(test_dataset, "test"))

    def _collating_for_logits(self, wanted: bool) -> AbstractContextManager:
        wanted = wanted and self.layout is not COLLATORS_LAYOUT
        return self.collating_with(self._collator("padded") if wanted else None)

    def _collator(self, layout: str) -> PaddedCollator | PackedCollator:
        pad_token_id = self.processing_class.pad_token_id
        return make_collator(layout, pad_token_id=pad_token_id, **self.args.collator_settings)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As transformers.Trainer's; rows passed here are prepared as those of the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_new(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def by_name(dataset: Rows | dict[str, Rows] | None, name: str) -> dict[str, Rows]:
    """`dataset`, or each of a dictionary's, by the name that errors have for it."""
    if isinstance(dataset, dict):
        return {f"{name}_{key}": each for key, each in dataset.items()}
    return {} if dataset is None else {name: dataset}
