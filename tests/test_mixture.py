"""Several datasets of a YAML file as one: their order, their shares, what is held out."""

import math

import pytest
import tiny
from datasets import Dataset

from fastdpo.arguments import DatasetConfig, DatasetMixtureConfig, ScriptArguments
from fastdpo.data import prepare_pairs
from fastdpo.mixture import load_datasets
from fastdpo.parser import TrainParser
from fastdpo.preferences import ORIGIN
from fastdpo.row_errors import RowError
from fastdpo.rows import in_one_schema


def load(mixture, *, with_eval=False, on_bad_rows="raise", seed=0):
    return load_datasets(
        ScriptArguments(), mixture, with_eval=with_eval, on_bad_rows=on_bad_rows, seed=seed
    )


@pytest.fixture
def parts(tmp_path):
    for name, count in (("a", 8), ("b", 4)):
        tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.rows(count))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def test_a_mixture_is_its_datasets_one_after_the_other(parts):
    rows, held_out = load(DatasetMixtureConfig(datasets=[DatasetConfig(path) for path in parts]))
    assert [row["prompt"] for row in rows] == [
        row["prompt"] for count in (8, 4) for row in tiny.rows(count)
    ]
    assert held_out is None


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_mixture_say_where_they_are_from(parts, streaming):
    datasets = [DatasetConfig(path) for path in parts]
    rows, _ = load(DatasetMixtureConfig(datasets=datasets, streaming=streaming))
    counts = zip(parts, (8, 4), strict=True)
    told = [f"{path}, row {i}" for path, count in counts for i in range(count)]
    assert [row[ORIGIN] for row in rows] == told


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixtures_malformed_rows_are_left_to_be_counted(parts, tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text("{\n" + (tmp_path / "a.jsonl").read_text())
    datasets = [DatasetConfig(path, columns=["prompt", "chosen", "rejected"]) for path in parts]
    mixture = DatasetMixtureConfig(datasets=datasets, streaming=streaming)
    rows, _ = load(mixture, on_bad_rows="skip")
    pairs, _ = prepare_pairs(rows, tiny.tokenizer(), on_bad_rows="skip")
    assert len(list(pairs)) == 12


def implicit(rows):
    """The same rows without a prompt of their own."""
    for row in rows:
        yield {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def chat(rows):
    for row in rows:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        yield {field: [{"role": role, "content": row[field]}] for field, role in roles.items()}


def with_a_call(rows):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    for row in chat(rows):
        row["chosen"].insert(0, {"role": "assistant", "content": "", "tool_calls": [call]})
        yield row | {"tools": [{"name": "f"}]}


UNLIKE = {
    "prompts in the one, none in the other": (iter, implicit),
    "messages of unlike keys": (chat, with_a_call),
    "prompts in neither": (implicit, implicit),
    "other columns": (lambda rows: ({**row, "score": 1} for row in rows), iter),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kinds", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("suffixes", [("jsonl", "jsonl"), ("jsonl", "parquet"), ("parquet",) * 2])
def test_sources_of_unlike_rows_make_one_mixture(suffixes, kinds, streaming, tmp_path):
    paths, apart = [], []
    for i, (suffix, kind) in enumerate(zip(suffixes, kinds, strict=True)):
        rows = list(kind(tiny.rows(3)))
        paths.append(str(tmp_path / f"{i}.{suffix}"))
        if suffix == "jsonl":
            tiny.write_rows(tmp_path / f"{i}.jsonl", rows)
        else:
            Dataset.from_list(rows).to_parquet(paths[-1])
        pairs, _ = prepare_pairs(Dataset.from_list(rows), tiny.tokenizer())
        apart += pairs
    datasets = [DatasetConfig(path) for path in paths]
    rows, _ = load(DatasetMixtureConfig(datasets=datasets, streaming=streaming))
    assert list(prepare_pairs(rows, tiny.tokenizer())[0]) == apart


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_and_conversations_do_not_mix(streaming, tmp_path):
    for name, rows in (("texts", tiny.rows(2)), ("chats", chat(tiny.rows(2)))):
        tiny.write_rows(tmp_path / f"{name}.jsonl", list(rows))
    datasets = [DatasetConfig(str(tmp_path / f"{name}.jsonl")) for name in ("texts", "chats")]
    told = r"all as conversations or all as texts, got .*texts.jsonl as texts.*chats.jsonl as conv"
    with pytest.raises(ValueError, match=told):
        load(DatasetMixtureConfig(datasets=datasets, streaming=streaming))


@pytest.mark.parametrize("settings", [{}, {"test_split_size": 2}, {"streaming": True}])
def test_a_malformed_row_of_a_mixture_is_reported_by_its_source(settings, parts, tmp_path):
    rows = [*tiny.rows(4), {"prompt": "a", "chosen": None, "rejected": "b"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    datasets = [DatasetConfig(path) for path in (*parts, str(tmp_path / "c.parquet"))]
    mixture = DatasetMixtureConfig(datasets=datasets, **settings)

    def prepare():
        halves = load(mixture, with_eval="test_split_size" in settings)
        return [list(prepare_pairs(half, tiny.tokenizer())[0]) for half in filter(None, halves)]

    with pytest.raises(RowError, match=r"c.parquet, row 4, field 'chosen': want a text"):
        prepare()


@pytest.mark.parametrize("streaming", [False, True])
def test_malformed_rows_among_unlike_sources_are_left_to_be_counted(streaming, parts, tmp_path):
    rows = [{"prompt": "a", "chosen": None, "rejected": "b"}, *tiny.rows(2)]
    Dataset.from_list([{**row, "score": 1} for row in rows]).to_parquet(tmp_path / "c.parquet")
    datasets = [DatasetConfig(path) for path in (*parts, str(tmp_path / "c.parquet"))]
    rows, _ = load(DatasetMixtureConfig(datasets=datasets, streaming=streaming), on_bad_rows="skip")
    pairs, _ = prepare_pairs(rows, tiny.tokenizer(), on_bad_rows="skip")
    assert len(list(pairs)) == 8 + 4 + 2


def test_fractions_cut_a_mixture_to_its_proportions(parts):
    datasets = [DatasetConfig(parts[0], fraction=1), DatasetConfig(parts[1], fraction=3)]
    rows, _ = load(DatasetMixtureConfig(datasets=datasets))
    assert [row["prompt"] for row in rows] == [tiny.PAIRS[i][0] for i in (0, 0, 1, 2, 3)]
    for fraction, count in ((0.45, 4), (0, 0)):  # 3.6 rows, and none
        datasets = [DatasetConfig(parts[0], fraction=1), DatasetConfig(parts[1], fraction=fraction)]
        assert len(load(DatasetMixtureConfig(datasets=datasets))[0]) == 8 + count


def test_the_same_rows_of_a_mixture_are_held_out_every_time(parts):
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(parts[0])], test_split_size=2)
    (train_rows, held_out), (_, again) = (
        load(mixture, with_eval=True),
        load(mixture, with_eval=True),
    )
    assert (len(train_rows), len(held_out)) == (6, 2)
    assert held_out[:] == again[:]
    without, none = load(mixture)
    assert without[:] == train_rows[:] and none is None
    _, others = load(mixture, with_eval=True, seed=1)
    assert others[:] != held_out[:]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_columns_are_those_of_the_file_whose_prompts_are_implicit(kind, tmp_path):
    rows = [{"chosen": "it is red", "rejected": "it is blue", "score": 1, "images": ["cat"]}] * 2
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    for columns in (["chosen", "rejected"], ["chosen", "rejected", "score"]):
        dataset = DatasetConfig(str(tmp_path / f"rows.{kind}"), columns=columns)
        for streaming in (False, True):
            mixture = DatasetMixtureConfig(datasets=[dataset], streaming=streaming)
            pairs, _ = prepare_pairs(load(mixture)[0], tiny.tokenizer())
            assert len(list(pairs)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_a_source_has_not_are_reported_by_its_name(streaming, tmp_path):
    Dataset.from_list(tiny.rows()).to_parquet(tmp_path / "rows.parquet")
    dataset = DatasetConfig(str(tmp_path / "rows.parquet"), columns=["promt", "chosen"])
    with pytest.raises(
        ValueError, match=r"rows.parquet: want the columns .*'promt'.*got \['prompt'"
    ):
        load(DatasetMixtureConfig(datasets=[dataset], streaming=streaming))


def test_a_count_of_rows_to_hold_out_comes_from_yaml_and_the_command_line(parts, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"datasets:\n  - path: {parts[0]}\ntest_split_size: 3\n")
    for flags, held_out in (((), 3), (("--test_split_size", "1"), 1)):
        run, *_ = TrainParser("fastdpo train").parse(["--config", str(config), *flags])
        assert len(load(run.mixture, with_eval=True)[1]) == held_out


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"test_split_size": 2.5}, "a share below 1 or a count, got 2.5"),
        ({"streaming": True, "test_split_size": 0.5}, "stream"),
        ({"streaming": True, "fractions": (1, 1)}, "stream"),
        ({"fractions": (1, None)}, "every dataset or for none"),
        ({"fractions": (2, -1)}, "every dataset or for none"),
        ({"fractions": (0, 0)}, "every dataset or for none"),
        ({"fractions": ("half", "half")}, "every dataset or for none"),
        ({"fractions": (1, math.nan)}, "every dataset or for none"),
        ({"fractions": (1, math.inf)}, "every dataset or for none"),
        ({"fractions": (1, 1e-3)}, "at least one row of .*b.jsonl, got none of 8 rows"),
        ({"test_split_size": math.nan}, "a share below 1 or a count, got nan"),
        ({"test_split_size": 12}, "leaves some of the mixture's 12 rows to train on, got 12"),
        ({"test_split_size": 0.99}, "12 rows to train on, got 0.99"),
        ({"test_split_size": -1}, "a share below 1 or a count, got -1"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(parts, changes, told):
    changes = dict(changes)
    fractions = changes.pop("fractions", (None, None))
    datasets = [DatasetConfig(p, fraction=f) for p, f in zip(parts, fractions, strict=True)]
    with pytest.raises(ValueError, match=told):
        load(DatasetMixtureConfig(datasets=datasets, **changes))


def test_evaluating_on_a_mixture_needs_rows_held_out(parts):
    with pytest.raises(ValueError, match="test_split_size"):
        load(DatasetMixtureConfig(datasets=[DatasetConfig(parts[0])]), with_eval=True)


def test_a_dataset_is_asked_for_as_flags_or_yaml_say(monkeypatch):
    asked = {}

    def load_rows(name, **settings):
        asked.update(settings)
        return Dataset.from_list(tiny.rows(2))

    monkeypatch.setattr("fastdpo.mixture.load_rows", load_rows)
    part = {"split": "s", "data_files": "f", "data_dir": "d", "columns": ["c"]}
    load(DatasetMixtureConfig(datasets=[DatasetConfig("some/pairs", name="en", **part)]))
    assert asked | part | {"config_name": "en"} == asked
    flags = ScriptArguments("some/pairs", dataset_config="fr", dataset_train_split="t")
    flags.dataset_test_split, flags.dataset_streaming = "e", True
    for with_eval, split in ((False, "t"), (True, "e")):
        load_datasets(
            flags, DatasetMixtureConfig(), with_eval=with_eval, on_bad_rows="skip", seed=0
        )
        assert (asked["config_name"], asked["split"]) == ("fr", split)
        assert (asked["streaming"], asked["on_bad_rows"]) == (True, "skip")


def test_a_bad_row_of_rows_in_memory_is_named_by_its_number_from_0():
    rows = Dataset.from_list([*tiny.rows(1), tiny.rows(1)[0] | {"rejected": None}])
    with pytest.raises(RowError, match="^a.jsonl, row 1, field 'rejected'"):
        in_one_schema(rows, "a.jsonl", skip_bad=False)
