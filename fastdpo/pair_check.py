"""Pairs that a model cannot embed, found before a GPU would end in an assert of its own."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from fastdpo.columns import ID_COLUMNS
from fastdpo.config import DPOConfig
from fastdpo.model import causal_lm_of

logger = logging.get_logger(__name__)

CHUNK = 1000
# of GPT-2, OPT (in GPT-J and CodeGen a buffer), BERT, GPT and CTRL (a buffer)
POSITION_TABLES = (
    "wpe",
    "embed_positions",
    "position_embeddings",
    "positions_embed",
    "pos_encoding",
)


def check_pairs(
    datasets: Mapping[str, Dataset | IterableDataset],
    models: Iterable[PreTrainedModel | PeftModel],
    args: DPOConfig,
) -> None:
    """ValueError, with dataset and pair, for one that some model cannot embed.

    That is a token id outside its vocabulary, or a pair, cut and padded as args say, longer than
    its table of positions. Packs and a precomputed reference also refuse a pair so long that rotary
    frequencies begin to follow the longest sequence of a forward. A stream goes unchecked.
    """
    causal_lms = [causal_lm_of(model) for model in models]
    _check_token_ids(datasets, causal_lms)
    _check_positions(datasets, causal_lms, args.max_length, args.pad_to_multiple_of or 1)
    for causal_lm in causal_lms:
        _check_frequencies(datasets, causal_lm, args)


def _check_token_ids(
    datasets: Mapping[str, Dataset | IterableDataset], causal_lms: list[PreTrainedModel]
) -> None:
    V, model = min((m.config.get_text_config().vocab_size, type(m).__name__) for m in causal_lms)
    for name, start, table in _tables(datasets):
        for field in ID_COLUMNS:
            largest, row = _largest(table[field].combine_chunks())
            if largest >= V:
                raise ValueError(
                    f"{name} dataset, pair {start + row}, {field}: want token ids in [0, {V}), "
                    f"the vocabulary of {model}, got {largest} (a token added to the tokenizer "
                    "and not to the model?)"
                )


def _check_positions(
    datasets: Mapping[str, Dataset | IterableDataset],
    causal_lms: list[PreTrainedModel],
    max_length: int | None,
    multiple: int,
) -> None:
    with_tables = filter(_has_position_table, causal_lms)
    tables = [(_num_positions(m.config.get_text_config()), m) for m in with_tables]
    P, model = min(tables, default=(sys.maxsize, None), key=lambda table: table[0])
    P -= P % multiple
    padded = f" padded to multiples of {multiple}" if multiple > 1 else ""
    if (max_length or sys.maxsize) <= P:
        return
    if found := _longer_pair(datasets, P):
        pair, length = found
        raise ValueError(
            f"{pair}: want at most {P} tokens, the positions of {type(model).__name__}{padded}, "
            f"got {length}: set max_length={P}"
        )


def _num_positions(config: Any) -> int:
    """The length of a table of positions; Whisper's config has another name for it."""
    if (length := getattr(config, "max_position_embeddings", None)) is not None:
        return length
    return config.max_target_positions


def _check_frequencies(
    datasets: Mapping[str, Dataset | IterableDataset], causal_lm: PreTrainedModel, args: DPOConfig
) -> None:
    """Of dynamic and longrope scaling: transformers picks it by a forward's longest sequence."""
    L = _length_of_fixed_frequencies(causal_lm.config.get_text_config())
    if (args.max_length or sys.maxsize) <= L:
        return
    if not (found := _longer_pair(datasets, L)):
        return
    pair, length = found
    what = (
        f"{pair}: {length} tokens, and from {L + 1} on the rotary frequencies of "
        f"{type(causal_lm).__name__} follow the longest sequence of a forward"
    )
    for setting in ("max_tokens_per_forward", "precompute_ref_log_probs"):
        if getattr(args, setting):
            raise ValueError(
                f"{what}: {setting} would change the result, unset it or set max_length={L}"
            )
    logger.warning(f"{what}: log-probabilities depend on the other pairs of a batch")


def _length_of_fixed_frequencies(config: Any) -> int:
    """The longest sequence whose rotary frequencies are those of any shorter one."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]  # by layer type
    lengths = [
        kind["original_max_position_embeddings"]
        if kind["rope_type"] == "longrope"
        else config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(lengths, default=sys.maxsize)


def _longer_pair(
    datasets: Mapping[str, Dataset | IterableDataset], limit: int
) -> tuple[str, int] | None:
    """A pair with a sequence of more than `limit` tokens, and how many; None if there is none."""
    for name, start, table in _tables(datasets):
        prompt, chosen, rejected = (pc.list_value_length(table[each]) for each in ID_COLUMNS)
        lengths = pc.add(prompt, pc.max_element_wise(chosen, rejected)).to_numpy()
        if lengths.max() > limit:
            return f"{name} dataset, pair {start + lengths.argmax()}", lengths.max()
    return None


def _tables(
    datasets: Mapping[str, Dataset | IterableDataset],
) -> Iterator[tuple[str, int, pa.Table]]:
    """Each dataset's name and token ids as Arrow columns, CHUNK pairs from the given one on."""
    for name, pairs in datasets.items():
        if isinstance(pairs, Dataset):
            columns = pairs.select_columns(list(ID_COLUMNS)).with_format("arrow")
            tables = columns.iter(CHUNK)
            for start, table in zip(range(0, len(pairs), CHUNK), tables, strict=True):
                yield name, start, table


def _has_position_table(model: nn.Module) -> bool:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    names += [name for name, _ in model.named_buffers()]
    return any(name.endswith(POSITION_TABLES) for name in names)


def _largest(column: pa.ListArray) -> tuple[int, int]:
    """The largest number in the lists of `column`, -1 for none, and the first row that has it."""
    numbers = pc.list_flatten(column)
    if len(numbers) == 0:
        return -1, 0
    largest = pc.max(numbers)
    row = pc.list_parent_indices(column)[pc.index(numbers, largest).as_py()]
    return largest.as_py(), row.as_py()
