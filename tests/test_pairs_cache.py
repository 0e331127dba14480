"""Pairs that an earlier start has tokenised: found again where nothing else has changed."""

import errno
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
import tiny
from datasets import Dataset, Features, Value
from pairs import pairs_of
from processes import run_ranks

from fastdpo.data import prepare_pairs
from fastdpo.row_errors import RowError
from fastdpo.rows import load_rows

NEXT_START = """
import sys
import tiny
from fastdpo.data import prepare_pairs
from fastdpo.rows import load_rows

for path in sys.argv[1:]:
    pairs, _ = prepare_pairs(load_rows(path), tiny.tokenizer())
    print(pairs.cache_files[0]["filename"])
"""


TRAINERS = """
import json, os, sys, time
import datasets
import tiny
from datasets import Dataset
from fastdpo import DPOConfig, DPOTrainer
from fastdpo.row_errors import RowError

rank = int(os.environ["RANK"])
calls, call = [], tiny.PreTrainedTokenizerFast.__call__

def noted(*arguments, **settings):
    if rank == 0 and not told:
        time.sleep(2)  # by itself, the other would be through first
    calls.append(arguments)
    return call(*arguments, **settings)

def start(rows):
    calls.clear()
    tokenizer = tiny.tokenizer()
    DPOTrainer(
        model=tiny.model("llama", len(tokenizer)),
        args=DPOConfig(output_dir=sys.argv[1], report_to="none", use_cpu=True, num_train_epochs=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return len(calls)

told = {}
tiny.PreTrainedTokenizerFast.__call__ = noted
told["kept"] = start(tiny.rows())
for name, bad_ranks in {"all": (0, 1), "first": (0,), "other": (1,)}.items():
    bad = {"prompt": name, "chosen": None, "rejected": "c"}
    try:
        told[name] = start([*tiny.rows(), *[bad] * (rank in bad_ranks)])
    except RowError as error:
        told[name] = str(error)
datasets.disable_caching()
told["afresh"] = start(tiny.rows())
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(told, file)
"""


@pytest.fixture
def tokenized(monkeypatch):
    """What a tokenizer is called with."""
    calls, call = [], tiny.PreTrainedTokenizerFast.__call__

    def noted(self, texts, **settings):
        calls.append(texts)
        return call(self, texts, **settings)

    monkeypatch.setattr(tiny.PreTrainedTokenizerFast, "__call__", noted)
    return calls


def files(pairs):
    return [file["filename"] for file in pairs.cache_files]


def test_pairs_of_files_are_found_at_the_next_start(tmp_path):
    paths, kept, tokenizer = [], [], tiny.tokenizer()
    for write, name, count in ((Dataset.to_json, "a.jsonl", 8), (Dataset.to_csv, "b.csv", 5)):
        paths.append(str(tmp_path / name))
        write(Dataset.from_list(tiny.rows(count)), paths[-1])
        tokenizer("used before")
        kept += files(prepare_pairs(load_rows(paths[-1]), tokenizer)[0])
    assert run_ranks(tmp_path, NEXT_START, *paths, world_size=1).split() == kept
    assert len({*kept}) == 2


CUTS = {  # settings, and whether a row is then too long, and one of equal sides
    "whole": ({"max_length": None}, (False, False)),
    "start": ({"max_length": 30}, (True, True)),
    "end": ({"max_length": 3, "truncation_mode": "keep_end"}, (False, True)),
}


@pytest.mark.parametrize(("settings", "becomes"), CUTS.values(), ids=CUTS)
def test_pairs_are_tokenised_once_however_they_are_cut(
    cache, tokenizer, tokenized, monkeypatch, settings, becomes
):
    rows = [
        {"prompt": "a b " * 50, "chosen": " c", "rejected": " d"},
        {"prompt": "a", "chosen": " b" * 50 + " c", "rejected": " b" * 50 + " d"},
        {"prompt": "a", "chosen": " c end", "rejected": " d end"},
    ]
    pairs_of(rows, tokenizer)
    tokenized.clear()
    found, counts = pairs_of(rows, tokenizer, **settings)
    assert not tokenized and (counts.too_long > 0, counts.equal > 0) == becomes
    monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", False)
    assert pairs_of(rows, tokenizer, **settings) == (found, counts) and tokenized


def test_other_rows_tokenizers_and_columns_make_other_pairs(cache, tokenizer, monkeypatch):
    monkeypatch.setattr("fastdpo.pairs_cache.HASHED_AT_ONCE", 2)
    rows = tiny.rows(3)
    long_texts = Features(dict.fromkeys(rows[0], Value("large_string")))
    for dataset, its_tokenizer, settings in [
        (Dataset.from_list(rows), tokenizer, {}),
        (Dataset.from_list([*rows[:2], rows[2] | {"chosen": " c c"}]), tokenizer, {}),
        (Dataset.from_list([rows[0] | {"chosen": " c c"}, *rows[1:]]), tokenizer, {}),
        (Dataset.from_list(rows).select([1, 0]), tokenizer, {}),
        (Dataset.from_list(rows, features=long_texts), tokenizer, {}),
        (Dataset.from_list(rows), tiny.tokenizer(["a b"] * 9), {}),
        (Dataset.from_list(rows), tokenizer, {"keep_columns": True}),
    ]:
        before = set(cache.glob("*"))
        pairs, _ = prepare_pairs(dataset, its_tokenizer, **settings)
        assert {*map(str, set(cache.glob("*")) - before)} == {*files(pairs)} != set()


def test_equal_rows_are_found_however_they_came_together(cache, tokenizer, tokenized):
    whole = Dataset.from_list(tiny.rows(4))
    pairs, _ = prepare_pairs(whole, tokenizer)
    tokenized.clear()
    parts = [Dataset.from_list(each) for each in (tiny.rows(4)[:3], tiny.rows(4)[3:])]
    together, _ = prepare_pairs(datasets.concatenate_datasets(parts), tokenizer)
    assert list(together) == list(pairs) and not tokenized


def test_pairs_of_rows_on_disk_are_kept_beside_them(cache, tmp_path, tokenizer):
    Dataset.from_list(tiny.rows()).save_to_disk(tmp_path / "rows")
    pairs, _ = prepare_pairs(Dataset.load_from_disk(tmp_path / "rows"), tokenizer)
    assert {os.path.dirname(file) for file in files(pairs)} == {str(tmp_path / "rows")}
    assert not cache.exists()


def test_pairs_that_other_code_made_are_not_taken_from_the_cache(tmp_path, tokenizer, monkeypatch):
    Dataset.from_list(tiny.rows()).save_to_disk(tmp_path)

    def cache_file():
        pairs, _ = prepare_pairs(Dataset.load_from_disk(tmp_path), tokenizer)
        return pairs.cache_files[0]["filename"]

    first = cache_file()
    assert cache_file() == first
    with monkeypatch.context() as other:
        other.setattr("transformers.__version__", "5.99")
        assert cache_file() != first
    sources = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: sources.append(path.name) or b"new")
    assert cache_file() != first
    names = "data preferences messages row_errors row_report columns".split()
    assert sources == [f"{name}.py" for name in names]


def with_end(rows):
    """Rows, one or a batch, that are not the same each time they are made."""
    chosen = os.environ["END"]
    return rows | {"chosen": [chosen] if isinstance(rows["chosen"], list) else chosen}


@pytest.mark.parametrize("made_by", [Dataset.map, Dataset.with_transform])
def test_rows_count_by_what_they_are_and_not_by_what_made_them(
    cache, tokenizer, monkeypatch, made_by
):
    rows = Dataset.from_list(tiny.rows(1))
    for end in (" c", " d"):
        monkeypatch.setenv("END", end)
        pairs, _ = prepare_pairs(made_by(rows, with_end), tokenizer)
        assert tokenizer.decode(pairs[0]["chosen_ids"]) == f"{end}</s>"
    assert cache.exists() == (made_by is Dataset.map), "nothing is kept of a transform"


def test_nothing_is_kept_without_caching(cache, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", False)
    prepare_pairs(Dataset.from_list(tiny.rows(1)), tokenizer)
    assert not cache.exists()


def test_what_several_processes_kept_is_found_by_one(cache, tokenizer, tokenized):
    pairs, _ = pairs_of(tiny.rows(), tokenizer, num_proc=2)
    assert len([*cache.iterdir()]) == 2
    tokenized.clear()
    assert pairs_of(tiny.rows(), tokenizer)[0] == pairs and not tokenized


def test_a_start_that_ends_early_leaves_no_file(cache, tokenizer):
    bad = {"prompt": "a", "chosen": None, "rejected": "c"}
    with pytest.raises(RowError, match="row 200"):
        pairs_of([*tiny.rows(1) * 200, bad], tokenizer)
    assert [*cache.iterdir()] == []


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_full_disk_ends_no_run(cache, tmp_path, tokenizer, caplog, monkeypatch, kind):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    dataset = Dataset.from_list(tiny.rows())
    if kind == "disk":
        dataset.save_to_disk(tmp_path / "rows")
        dataset = Dataset.load_from_disk(tmp_path / "rows")
    monkeypatch.setattr(shutil, "move", full)  # as datasets ends the writing of a file
    pairs, _ = prepare_pairs(dataset, tokenizer)
    assert pairs.cache_files == [] and "No space left" in caplog.records[-1].getMessage()
    monkeypatch.undo()
    assert list(pairs) == list(prepare_pairs(dataset, tokenizer)[0])


def test_a_cache_folder_that_cannot_be_made_ends_no_run(cache, tokenizer, caplog):
    cache.parent.write_text("no folder")
    pairs, _ = pairs_of(tiny.rows(), tokenizer)
    assert len(pairs) == len(tiny.rows())
    assert "tokenised in memory, and again at the next start" in caplog.records[-1].getMessage()


def test_one_rank_tokenises_for_all_and_its_errors_hold_up_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run_ranks(tmp_path, TRAINERS, str(tmp_path), world_size=2)
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["kept"] > 0 and other["kept"] == 0
    assert first["afresh"] == other["afresh"] == first["kept"]
    for rank, told in enumerate((first, other)):
        for name, bad_ranks in {"all": (0, 1), "first": (0,), "other": (1,)}.items():
            assert ("field 'chosen'" in str(told[name])) == (rank in bad_ranks)
