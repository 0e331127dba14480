"""Files, folders and Hub names as rows; what is wrong in them is named or counted."""

import io
import json
import tracemalloc
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset
from pairs import CHAT
from row_files import texts, write_lines

from fastdpo.data import prepare_pairs
from fastdpo.preferences import MALFORMED
from fastdpo.row_errors import RowError
from fastdpo.rows import as_dataset, in_one_schema, load_rows


def no_rows():
    file = io.BytesIO()
    pq.write_table(pa.table({"chosen": pa.array([], "string")}), file)
    return file.getvalue()


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
    parts = load_rows(str(tmp_path), split="train[3:]+test[:1]")
    assert texts(parts) == [*tiny.rows(5)[3:], tiny.rows(1)[0]]
    for split in ("dev", "dev[:1]", "train[:x]"):
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_rows(str(tmp_path), split=split)
    with pytest.raises(ValueError, match=r"want one of the splits .*got 'train\[:2\]'"):
        load_rows(str(tmp_path), split="train[:2]", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_files_of_a_folder_are_read_as_single_ones_are(streaming, tmp_path, monkeypatch):
    dated = tiny.rows(1)[0] | {"chosen": "2026-01-31"}
    lines = [tiny.rows(2), [b"{", dated, tiny.rows(1)[0] | {"tools": []}]]
    for number, each in enumerate(lines):
        write_lines(tmp_path / f"train-{number}.jsonl", each)
    with pytest.raises(RowError, match="train-1.jsonl, line 1, field 'row'"):
        list(load_rows(str(tmp_path), streaming=streaming))
    monkeypatch.chdir(tmp_path)
    rows = load_rows(".", streaming=streaming, on_bad_rows="skip")
    assert [row["chosen"] for row in rows][2:4] == [None, "2026-01-31"]
    named = {"path_or_name": "json", "data_files": str(tmp_path / "*-1.jsonl")}
    rows = load_rows(**named, streaming=streaming, on_bad_rows="skip")
    assert [row["chosen"] for row in rows][:2] == [None, "2026-01-31"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix, at", [("jsonl", "line 1"), ("csv", "row 0")])
def test_a_conversation_is_malformed_among_the_texts_of_another_file(
    suffix, at, streaming, tmp_path
):
    chat = {name: json.dumps(messages) for name, messages in CHAT.items()}
    for name, rows in {"a": tiny.rows(2), "b": [chat if suffix == "csv" else CHAT]}.items():
        if suffix == "csv":
            Dataset.from_list(rows).to_csv(tmp_path / f"{name}.csv")
        else:
            write_lines(tmp_path / f"{name}.jsonl", rows)
    told = rf"b.{suffix}, {at}, field 'prompt': want a str, as in the rows before, got \[{{"
    with pytest.raises(RowError, match=told):
        list(load_rows(str(tmp_path), streaming=streaming))
    rows = load_rows(str(tmp_path), streaming=streaming, on_bad_rows="skip")
    assert [row.get(MALFORMED) is None for row in rows] == [True, True, False]


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (["train.jsonl", "more.jsonl"], "more.jsonl"),
        (["a.jsonl", "b.jsonl", "c.csv"], "c.csv"),
        (["a.jsonl", "b.jsonl", ".c.jsonl", "notes.txt"], None),
        (["train-1.jsonl", "train-2.jsonl", "test.jsonl"], None),
    ],
)
def test_files_of_a_folder_that_stay_unread_are_named(names, unread, tmp_path, caplog):
    for name in names:
        write_lines(tmp_path / name, tiny.rows(1))
    load_rows(str(tmp_path))
    assert (f"1 are not, such as {unread}" in caplog.text) if unread else not caplog.text


def test_files_beside_those_that_were_named_are_not_missed(tmp_path, caplog):
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / name, tiny.rows(1))
    assert len(load_rows(str(tmp_path), data_files="a.jsonl")) == 1
    assert not caplog.text


def test_files_that_are_elsewhere_are_read_by_datasets(monkeypatch):
    url = "https://somewhere/rows.jsonl"
    there, read = types.SimpleNamespace(config=types.SimpleNamespace()), []
    there.config.data_files = {"train": [url]}
    monkeypatch.setattr("datasets.load_dataset_builder", lambda **_: there)
    monkeypatch.setattr("datasets.load_dataset", lambda **settings: read.append(settings))
    load_rows("json", data_files=url)
    assert read[0]["data_files"] == url


def test_columns_are_taken_from_a_stream_that_does_not_say_which_it_has(monkeypatch):
    stream = IterableDataset.from_generator(lambda: iter(tiny.rows(2)))
    assert stream.column_names is None
    monkeypatch.setattr("datasets.load_dataset", lambda **_: stream)
    rows = load_rows("some/pairs", streaming=True, columns=["chosen", "rejected"])
    assert [list(row) for row in rows] == [["chosen", "rejected"]] * 2


def test_a_file_gives_parts_of_its_rows(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", tiny.rows(4))
    assert texts(load_rows(path, split="train[50%:]")) == tiny.rows(4)[2:]


@pytest.mark.parametrize("kind", ["jsonl", "json-stream", "csv", "parquet", "mixture"])
def test_a_prompt_in_a_column_of_another_name_is_warned_of(kind, tmp_path, caplog):
    row = {
        "system": "s",
        "question": "Who?",
        "chosen": "It is I",
        "rejected": "It is he",
        "id": "x",
    }
    path = tmp_path / f"rows.{kind.partition('-')[0]}"
    if kind == "csv":
        Dataset.from_list([row] * 2).to_csv(path)
    elif kind in ("parquet", "mixture"):
        Dataset.from_list([row] * 2).to_parquet(path := tmp_path / "rows.parquet")
    else:
        path.write_text("\n".join(map(json.dumps, [row] * 2)))
    rows = load_rows(str(path), streaming=kind == "json-stream")
    if kind == "mixture":
        rows = in_one_schema(rows, str(path), skip_bad=False)
    prepare_pairs(rows, tiny.tokenizer(), name=kind)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "no column prompt" in told and told.endswith("not read: ['system', 'question']")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Who?", "prompt": "Q: Who? A:", "chosen": " I", "rejected": " he"},
        {
            "chosen": "It is I",
            "rejected": "It is he",
            "source": "x",
            "id": "y",
            "score_chosen": 1.0,
        },
        {"question": "Who?", "prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
    ],
    ids=["a prompt", "bookkeeping", "ids"],
)
def test_other_columns_are_not_warned_of(row, caplog):
    prepare_pairs(Dataset.from_list([row]), tiny.tokenizer(), name=str(row))
    assert not caplog.records


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["lines", "array", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_rows(kind, streaming, tmp_path):
    path = tmp_path / ("rows.csv" if kind == "csv" else "rows.json")
    if kind == "csv":
        Dataset.from_list(tiny.rows()).to_csv(path)
    else:
        path.write_text("\n".join(map(json.dumps, tiny.rows())))
    if kind == "array":
        path.write_text(json.dumps(tiny.rows()))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert texts(load_rows(str(path), streaming=streaming)) == tiny.rows()


def test_rows_in_memory_are_not_copied():
    rows = [row | {"chosen": 2**20 * "c"} for row in tiny.rows(8)] * 4
    tracemalloc.start()  # of what Python holds, and not Arrow
    try:
        kept = as_dataset(rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert list(kept) == rows
    assert peak < 2**22


def test_messages_with_tool_calls_are_kept_among_others():
    rows = [CHAT, CHAT | {"tools": "[]"}, *[calls({"x": 1})] * 3, CHAT]
    kept = list(as_dataset(rows))
    assert [row["tools"] for row in kept] == [None, "[]"] + [None] * 4
    assert [list(map(json.loads, row["chosen"])) for row in kept] == [row["chosen"] for row in rows]


def test_a_row_of_another_kind_than_those_before_is_named():
    with pytest.raises(RowError, match="rows, row 5, field 'prompt': want values of the kind"):
        as_dataset([*tiny.rows(3), *tiny.rows(2), CHAT])


def test_rows_that_could_not_be_read_are_counted_with_the_others(tmp_path, caplog):
    lines = [b"{", {"prompt": "a"}, *tiny.rows(2), {"prompt": "a", "chosen": "b", "rejected": 3}]
    rows = load_rows(write_lines(tmp_path / "rows.jsonl", lines), on_bad_rows="skip")
    pairs, counts = prepare_pairs(rows, tiny.tokenizer(), on_bad_rows="skip")
    assert (counts.rows, counts.pairs, counts.bad) == (5, 2, 3) and len(pairs) == 2
    (record,) = caplog.records
    for told in ("3 malformed rows", "line 1, field 'row'", "line 2, field 'chosen'", "line 5"):
        assert told in record.getMessage()
    streamed = load_rows(str(tmp_path / "rows.jsonl"), on_bad_rows="skip", streaming=True)
    stream, _ = prepare_pairs(streamed, tiny.tokenizer(), on_bad_rows="skip")
    assert list(stream) == list(pairs)


def test_a_file_without_a_row_that_could_be_read_is_named_with_the_first_reason(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [b"{", {"prompt": "a"}])
    told = r"rows.jsonl: want at least one row, got none \(2 malformed, the first: .*line 1, "
    with pytest.raises(ValueError, match=told):
        load_rows(path, on_bad_rows="skip")
    stream = load_rows(path, on_bad_rows="skip", streaming=True)
    with pytest.raises(ValueError, match="got none, the first: .*rows.jsonl, line 1, "):
        prepare_pairs(stream, tiny.tokenizer(), on_bad_rows="skip")


def test_why_a_row_of_a_mixture_could_not_be_read_stays_its_reason(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [*tiny.rows(1), b"{"])
    rows = in_one_schema(load_rows(path, on_bad_rows="skip"), path, skip_bad=True)
    assert rows[MALFORMED][0] is None and "line 2, field 'row'" in rows[MALFORMED][1]


def test_what_only_a_later_row_has_is_kept(tmp_path):
    logps = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    lines = [CHAT, CHAT | {"tools": [{"name": "add"}]}, CHAT | logps]
    rows = load_rows(write_lines(tmp_path / "rows.jsonl", lines))
    assert [row["tools"] for row in rows] == [None, '[{"name": "add"}]', None]
    with pytest.raises(RowError, match="row 2, field 'ref_chosen_logps'"):
        prepare_pairs(rows, tiny.tokenizer())


def calls(*arguments):
    calls = [{"type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    return CHAT | {"chosen": [message, {"role": "tool", "content": "1"}, *CHAT["chosen"]]}


def test_tool_calls_keep_each_their_own_arguments(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    rows = [calls({"city": "Paris"}), calls({"x": 1}, {"x": "one", "none": None}), CHAT]
    rows[2] = CHAT | {"prompt": [CHAT["prompt"][0] | {"meta": {"deep": [1, "two", 2**70]}}]}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    kept, streamed = (
        prepare_pairs(load_rows(path, streaming=streaming), tokenizer)[0]
        for streaming in (False, True)
    )
    assert list(kept) == list(streamed)
    for row, pair in zip(rows, kept, strict=True):
        text = tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"])
        messages = [{k: v for k, v in m.items() if v is not None} for m in row["chosen"]]
        assert json.loads(f"[{text.removesuffix('</s>').replace('}{', '}, {')}]") == [
            *row["prompt"],
            *messages,
        ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"prompt,chosen,rejected\na,b,c\nd,e,f,g\n"),
        ("rows.csv", "prompt,chosen,rejected\na,\u00e9,c\n".encode("latin-1")),
        ("rows.csv", b""),
        ("rows.csv", b"prompt,chosen,rejected\n"),
        ("rows.csv", b'prompt,chosen,rejected\na,b,"c\n'),
        ("rows.parquet", b"no parquet"),
        ("rows.parquet", no_rows()),
    ],
    ids=["ragged", "latin-1", "empty", "no rows", "no end", "no parquet", "empty parquet"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_cannot_be_read_is_named(streaming, name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        list(load_rows(str(tmp_path / name), streaming=streaming))
    assert str(error.value).count(name) == 1


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/rows", "~/nowhere"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name):
    with pytest.raises(ValueError, match="is not there"):
        load_rows(name)


def test_the_hubs_arguments_are_refused_for_local_rows(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", tiny.rows(2))
    Dataset.from_list(tiny.rows()).save_to_disk(tmp_path / "saved")
    for there in (path, str(tmp_path / "saved")):
        with pytest.raises(ValueError, match="want none of .*got {'config_name': 'hard'}"):
            load_rows(there, config_name="hard")


def test_splits_and_files_that_are_not_there_are_refused(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", tiny.rows(2))
    with pytest.raises(ValueError, match=r"want one of the splits \['train'\], got 'test'"):
        load_rows(path, split="test")
    with pytest.raises(ValueError, match=r"rows.jsonl: want at least one row.*'train\[2:\]' of"):
        load_rows(path, split="train[2:]")
    assert len(load_rows(path, split="train[2:]+train[:1]")) == 1
    with pytest.raises(ValueError, match=r"got 'train\[:1\]' \(a stream has no parts\)"):
        load_rows(path, split="train[:1]", streaming=True)
    DatasetDict({"train": Dataset.from_list(tiny.rows())}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"want one of the splits \['train'\], got 'test'"):
        load_rows(str(tmp_path / "saved"), split="test")
    Dataset.from_list(tiny.rows()).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="one: want split 'train' of a single dataset, got 'test'"):
        load_rows(str(tmp_path / "one"), split="test")
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match="want a file of"):
        load_rows(str(tmp_path / "rows.txt"))
    with pytest.raises(ValueError, match="want at least one row"):
        load_rows(write_lines(tmp_path / "empty.jsonl", []))
