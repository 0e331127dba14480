"""The rows of a run: one dataset by its name, or several of a YAML file as a mixture.

ScriptArguments, DatasetMixtureConfig --load_datasets--> preference rows
"""

import math

from datasets import Dataset, IterableDataset, Value, concatenate_datasets

from fastdpo.arguments import DatasetMixtureConfig, ScriptArguments
from fastdpo.preferences import ORIGIN
from fastdpo.rows import Rows, in_one_schema, load_rows


def load_datasets(
    script_args: ScriptArguments,
    mixture_args: DatasetMixtureConfig,
    *,
    with_eval: bool,
    on_bad_rows: str,
    seed: int,
) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to evaluate on where `with_eval`, else None.

    `seed` decides which rows of a mixture are held out. RowError for a malformed row, ValueError
    or OSError for a dataset that is not there or does not fit the others.
    """
    if mixture_args.datasets:
        return _load_mixture(mixture_args, with_eval=with_eval, on_bad_rows=on_bad_rows, seed=seed)

    def load(split: str) -> Rows:
        return load_rows(
            script_args.dataset_name,
            config_name=script_args.dataset_config,
            split=split,
            streaming=script_args.dataset_streaming,
            on_bad_rows=on_bad_rows,
        )

    train = load(script_args.dataset_train_split)
    return train, load(script_args.dataset_test_split) if with_eval else None


def _load_mixture(
    mixture_args: DatasetMixtureConfig, *, with_eval: bool, on_bad_rows: str, seed: int
) -> tuple[Rows, Rows | None]:
    held_out = mixture_args.test_split_size
    if with_eval and held_out is None:
        raise ValueError("want test_split_size with `datasets` and an eval_strategy, got none")
    if held_out is not None and mixture_args.streaming:
        raise ValueError("want test_split_size or streaming, got both: a stream cannot be split")
    if held_out is not None:
        if not 0 < held_out < math.inf or (held_out > 1 and held_out % 1):
            raise ValueError(f"want test_split_size as a share below 1 or a count, got {held_out}")
        held_out = int(held_out) if held_out >= 1 else held_out  # a flag's count is a float

    parts = []
    for each in mixture_args.datasets:
        rows = load_rows(
            each.path,
            config_name=each.name,
            split=each.split,
            streaming=mixture_args.streaming,
            data_files=each.data_files,
            data_dir=each.data_dir,
            columns=each.columns,
            on_bad_rows=on_bad_rows,
        )
        parts.append(rows)
    names = [each.path for each in mixture_args.datasets]
    parts = _concatenable(parts, names, skip_bad=on_bad_rows == "skip")
    parts = [_with_origin(part, name) for part, name in zip(parts, names, strict=True)]
    fractions = [each.fraction for each in mixture_args.datasets]
    if any(fraction is not None for fraction in fractions):
        if mixture_args.streaming:
            raise ValueError("want fraction or streaming, got both: a stream has no length")
        parts = _in_proportion(parts, fractions, names)
    rows = concatenate_datasets(parts)
    if held_out is None:
        return rows, None
    try:
        halves = rows.train_test_split(test_size=held_out, seed=seed)
    except ValueError:
        wanted = f"a test_split_size that leaves some of the mixture's {len(rows)} rows to train on"
        raise ValueError(f"want {wanted}, got {held_out}") from None
    return halves["train"], halves["test"] if with_eval else None


def _concatenable(parts: list[Rows], names: list[str], *, skip_bad: bool) -> list[Rows]:
    """`parts` with the same columns; as they are, where they have. ValueError for texts beside
    conversations, as far as columns and first rows show it."""
    kinds = {name: _kind(part) for name, part in zip(names, parts, strict=True)}
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    if len({*kinds.values()}) > 1:
        detail = ", ".join(f"{name} as {kind}" for name, kind in kinds.items())
        raise ValueError(f"want `datasets` all as conversations or all as texts, got {detail}")
    is_stream = isinstance(parts[0], IterableDataset)
    if not is_stream and all(part.features == parts[0].features for part in parts):
        return parts
    named = zip(parts, names, strict=True)
    return [in_one_schema(part, name, skip_bad=skip_bad) for part, name in named]


def _kind(part: Rows) -> str | None:
    """Whether its rows are texts or conversations, by its columns or its first row; None for
    neither, or where that row says nothing."""
    if part.features is None:
        chosen = next(iter(part), {}).get("chosen")
        is_text = isinstance(chosen, str)
    else:
        chosen = part.features.get("chosen")
        is_text = isinstance(chosen, Value)
    if chosen is None:
        return None
    return "texts" if is_text else "conversations"


def _with_origin(rows: Rows, source: str) -> Rows:
    """`rows` with a column that says where each is from, for the errors of a mixture's rows."""
    if isinstance(rows, IterableDataset):
        return rows.map(lambda _, i: {ORIGIN: f"{source}, row {i}"}, with_indices=True)
    return rows.add_column(ORIGIN, [f"{source}, row {i}" for i in range(len(rows))])


def _in_proportion(
    parts: list[Dataset], fractions: list[float | None], names: list[str]
) -> list[Dataset]:
    """The first rows of each part, as many as give the largest mixture in these proportions."""
    are_numbers = all(isinstance(fraction, (int, float)) for fraction in fractions)
    are_shares = are_numbers and all(0 <= fraction < math.inf for fraction in fractions)
    if not are_shares or not sum(fractions):
        raise ValueError(f"want a fraction >= 0 for every dataset or for none, got {fractions}")
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share)
    counts = [round(share * total) for share in shares]
    for share, count, name in zip(shares, counts, names, strict=True):
        if share and not count:
            raise ValueError(
                f"want a fraction of at least one row of {name}, got none of {round(total)} rows "
                f"of the mixture with fractions {fractions}"
            )
    return [part.select(range(count)) for part, count in zip(parts, counts, strict=True)]
