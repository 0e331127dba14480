import json

import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset

from fastdpo.data import RowError
from fastdpo.rows import load_rows

CHAT = {
    "prompt": [{"role": "user", "content": "Two and two?"}],
    "chosen": [{"role": "assistant", "content": "Four."}],
    "rejected": [{"role": "assistant", "content": "Five."}],
}


def write_lines(path, lines):
    path.write_bytes(
        b"\n".join(each if isinstance(each, bytes) else dumped(each) for each in lines)
    )
    return str(path)


def dumped(row):
    return json.dumps(row).encode()


def texts(rows):
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json-lines", "parquet", "csv", "disk", "dict"])
def test_every_kind_of_source_gives_the_same_rows(kind, tmp_path):
    rows = tiny.rows()
    path = tmp_path / f"rows.{kind.removesuffix('-lines')}"
    if kind in ("jsonl", "json-lines"):
        write_lines(path if kind == "jsonl" else tmp_path / "rows.json", rows)
        path = path if kind == "jsonl" else tmp_path / "rows.json"
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "csv":
        Dataset.from_list(rows).to_csv(path)
    elif kind == "disk":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(path)
    assert texts(load_rows(str(path))) == rows
    streamed = load_rows(str(path), streaming=True)
    assert isinstance(streamed, IterableDataset) and texts(streamed) == rows


def test_a_folder_of_files_has_its_splits(tmp_path):
    write_lines(tmp_path / "train.jsonl", tiny.rows(5))
    write_lines(tmp_path / "test.jsonl", tiny.rows(2))
    assert len(load_rows(str(tmp_path))) == 5
    assert len(load_rows(str(tmp_path), split="test")) == 2


def test_csv_cells_may_hold_conversations(tmp_path):
    Dataset.from_list([{k: json.dumps(v) for k, v in CHAT.items()}]).to_csv(tmp_path / "rows.csv")
    assert texts(load_rows(str(tmp_path / "rows.csv"))) == [CHAT]


def test_tools_need_not_be_alike(tmp_path):
    tools = [[{"name": "add"}], [{"name": "look", "far": {"deep": [1, "two"]}}]]
    path = write_lines(tmp_path / "rows.jsonl", [CHAT | {"tools": each} for each in tools])
    assert [json.loads(row["tools"]) for row in load_rows(path)] == tools


MALFORMED = {
    "bad-json": (b'{"prompt": "a", ', "field 'row': want an object in JSON"),
    "broken-utf8": (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', "utf-8"),
    "not-an-object": ([1, 2], "field 'row'"),
    "missing-chosen": ({"prompt": "a", "rejected": "c"}, "field 'chosen'.*no such field"),
    "empty-rejected": ({"prompt": "a", "chosen": "b", "rejected": ""}, "field 'rejected'"),
    "number-for-text": ({"prompt": 3, "chosen": "b", "rejected": "c"}, "field 'prompt'.*got 3"),
}


@pytest.mark.parametrize(("line", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_told_by_file_line_and_field(line, message, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [*tiny.rows(2), line, *tiny.rows(1)])
    with pytest.raises(RowError, match=rf"rows.jsonl, line 3, .*{message}"):
        load_rows(path)
    assert len(load_rows(path, on_bad_rows="skip")) == 3


def test_rows_of_an_array_are_told_by_the_line_they_begin_in(tmp_path):
    text = json.dumps([*tiny.rows(1), {"prompt": "a"}], indent=1)
    (tmp_path / "rows.json").write_text(text)
    line = text.split('"prompt": "a"')[0].count("\n")
    with pytest.raises(RowError, match=rf"line {line}, field 'chosen'"):
        load_rows(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(text[:-4])
    with pytest.raises(RowError, match="line .*want JSON"):
        load_rows(str(tmp_path / "rows.json"), on_bad_rows="skip")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/rows"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name):
    with pytest.raises(ValueError, match="is not there"):
        load_rows(name)


def test_splits_and_files_that_are_not_there_are_refused(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", tiny.rows(2))
    with pytest.raises(ValueError, match="want split 'train' of a single file, got 'test'"):
        load_rows(path, split="test")
    DatasetDict({"train": Dataset.from_list(tiny.rows())}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"want one of the splits \['train'\], got 'test'"):
        load_rows(str(tmp_path / "saved"), split="test")
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match="want a file of"):
        load_rows(str(tmp_path / "rows.txt"))
    with pytest.raises(ValueError, match="want at least one row"):
        load_rows(write_lines(tmp_path / "empty.jsonl", []))
