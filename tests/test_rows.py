"""Files, folders and Hub names as rows; what is wrong in them is named or counted."""

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset
from pairs import CHAT

from fastdpo.data import prepare_pairs
from fastdpo.preferences import MALFORMED as MARK
from fastdpo.row_errors import RowError
from fastdpo.rows import as_dataset, in_one_kind, load_rows


def no_rows():
    file = io.BytesIO()
    pq.write_table(pa.table({"chosen": pa.array([], "string")}), file)
    return file.getvalue()


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


def test_a_csv_cell_that_is_no_json_is_told_or_counted(tmp_path):
    row = {k: json.dumps(v) for k, v in CHAT.items()}
    Dataset.from_list([row, row | {"chosen": "[{"}]).to_csv(tmp_path / "rows.csv")
    path = str(tmp_path / "rows.csv")
    with pytest.raises(RowError, match=r"rows.csv, row 1, field 'chosen'"):
        load_rows(path)
    pairs, counts = prepare_pairs(
        load_rows(path, on_bad_rows="skip"), tiny.tokenizer(), on_bad_rows="skip"
    )
    assert (counts.pairs, counts.bad) == (1, 1)
    streamed = load_rows(path, on_bad_rows="skip", streaming=True)
    assert list(prepare_pairs(streamed, tiny.tokenizer(), on_bad_rows="skip")[0]) == list(pairs)


def test_a_csv_row_whose_cells_are_all_broken_messages_is_no_row_of_texts(tmp_path):
    row = {k: json.dumps(v) for k, v in CHAT.items()}
    broken = {name: cell[:-1] for name, cell in row.items()}
    Dataset.from_list([row, broken]).to_csv(tmp_path / "rows.csv")
    for streaming in (False, True):
        with pytest.raises(RowError, match=r"rows.csv, row 1, field 'prompt': want JSON"):
            list(load_rows(str(tmp_path / "rows.csv"), streaming=streaming))


def test_an_empty_csv_cell_is_no_value_and_none_is_a_word(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,tools\na,NA,null,\nb,c,,\n")
    rows = list(load_rows(str(tmp_path / "rows.csv")))
    assert texts(rows[:1]) == [{"prompt": "a", "chosen": "NA", "rejected": "null"}]
    assert (rows[0]["tools"], rows[1]["rejected"]) == (None, None)


def test_csv_texts_stay_as_they_are_written(tmp_path):
    lines = ["prompt,chosen,rejected,score"]
    lines += ["2+2=,4,5,0.5"] * 3 + ["1+1=,02,True,0.5", "half=,1.50,007,1"]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    rows = load_rows(str(tmp_path / "rows.csv"))
    assert texts(rows)[3:] == [
        {"prompt": "1+1=", "chosen": "02", "rejected": "True"},
        {"prompt": "half=", "chosen": "1.50", "rejected": "007"},
    ]
    assert texts(load_rows(str(tmp_path / "rows.csv"), streaming=True)) == texts(rows)


def test_a_csv_text_may_begin_as_messages_do(tmp_path):
    rows = [
        {"prompt": "In JSON:", "chosen": '[{"a": 1}]', "rejected": "[{1}]"},
        {"prompt": '[{"b": 2}]', "chosen": '[{"a": 1}]', "rejected": "no"},
    ]
    Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    for streaming in (False, True):
        assert texts(load_rows(str(tmp_path / "rows.csv"), streaming=streaming)) == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_row_has_as_many_fields_as_the_header(streaming, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\n1,a,b,c\n2,a,b,c\n3,a,b\n")
    path = str(tmp_path / "rows.csv")
    with pytest.raises(RowError, match=r"rows.csv, row 0: want 3 fields, as in the header, got 4"):
        list(load_rows(path, streaming=streaming))
    rows = list(load_rows(path, streaming=streaming, on_bad_rows="skip"))
    assert [row["prompt"] for row in rows] == [None, None, "3"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_csv_files_has_no_surplus_fields_either(streaming, tmp_path):
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\na,b,c\nd,e,f\n")
    assert len(list(load_rows(str(tmp_path), streaming=streaming))) == 2
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\n1,a,b,c\n2,d,e,f\n")
    with pytest.raises(RowError, match="train.csv, row 0: want 3 fields, as in the header, got 4"):
        load_rows(str(tmp_path), streaming=streaming)


def test_a_name_that_comes_twice_in_a_csv_header_is_told(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,chosen,rejected\na,b,c,d\n")
    with pytest.raises(ValueError, match="rows.csv: want each name once in the header, got"):
        load_rows(str(tmp_path / "rows.csv"))


def test_a_csv_column_that_no_one_reads_may_hold_anything(tmp_path):
    lines = ["prompt,chosen,rejected,note,ref_chosen_logps,ref_rejected_logps"]
    lines += [f"a,b,c,{note},-1,-2.5" for note in ("1", "x", "9" * 30)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    rows = load_rows(str(tmp_path / "rows.csv"))
    assert rows["note"][:] == ["1", "x", "9" * 30]
    assert (rows["ref_chosen_logps"][0], rows["ref_rejected_logps"][0]) == (-1.0, -2.5)
    (tmp_path / "rows.csv").write_text("\n".join(lines).replace("-2.5", "low"))
    with pytest.raises(RowError, match="row 0, field 'ref_rejected_logps': want a finite number"):
        load_rows(str(tmp_path / "rows.csv"))


def test_csv_rows_of_another_kind_are_told_by_their_row(tmp_path):
    chat = {k: json.dumps(v) for k, v in CHAT.items()}
    Dataset.from_list([chat, *tiny.rows(2)]).to_csv(tmp_path / "rows.csv")
    with pytest.raises(RowError, match="rows.csv, row 1, field 'prompt': want values of the kind"):
        load_rows(str(tmp_path / "rows.csv"))


def test_tools_need_not_be_alike(tmp_path):
    tools = [[{"name": "add"}], [{"name": "look", "far": {"deep": [1, "two"]}}]]
    path = write_lines(tmp_path / "rows.jsonl", [CHAT | {"tools": each} for each in tools])
    assert [json.loads(row["tools"]) for row in load_rows(path)] == tools


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
        rows = in_one_kind(rows, str(path), skip_bad=False)
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


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_not_there_are_told(streaming, tmp_path):
    row = {"prompt": "a", "chosen": "it is", "rejected": "it was"}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=r"jsonl: want the columns .*, line 1 has no \['promt'"):
        list(load_rows(path, columns=["promt", "chosen", "rejected"], streaming=streaming))


def test_a_column_may_hold_more_than_a_piece_of_arrow(monkeypatch):
    make = Dataset.from_dict

    def overflowing(columns):
        if max(map(len, columns.values())) > 3:
            raise pa.ArrowInvalid("offset overflow while concatenating arrays")
        return make(columns)

    monkeypatch.setattr(Dataset, "from_dict", overflowing)
    rows = [CHAT, CHAT | {"tools": "[]"}, *[calls({"x": 1})] * 3, CHAT]
    kept = list(as_dataset(rows))
    assert [row["tools"] for row in kept] == [None, "[]"] + [None] * 4
    assert [list(map(json.loads, row["chosen"])) for row in kept] == [row["chosen"] for row in rows]
    with pytest.raises(RowError, match="rows, row 5, field 'prompt': want values of the kind"):
        as_dataset([*tiny.rows(3), *tiny.rows(2), CHAT])


MALFORMED = {
    "bad-json": (b'{"prompt": "a", ', "field 'row': want an object in JSON"),
    "broken-utf8": (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', "utf-8"),
    "not-an-object": ([1, 2], "field 'row'"),
    "missing-chosen": ({"prompt": "a", "rejected": "c"}, "field 'chosen'.*got none"),
    "null-rejected": ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected'"),
    "null-prompt": ({"prompt": None, "chosen": "a b", "rejected": "a c"}, "field 'prompt'"),
    "images": (tiny.rows(1)[0] | {"images": ["cat.png"]}, "field 'images'.*vision-language"),
    "number-for-text": ({"prompt": 3, "chosen": "b", "rejected": "c"}, "field 'prompt'.*got 3"),
    "number-for-chosen": ({"prompt": "a", "chosen": 3, "rejected": "c"}, "field 'chosen'.*got 3"),
    "half-a-character": (b'{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', "'chosen'.*Uni"),
    "a-name-twice": (b'{"prompt": "a", "chosen": "b", "chosen": "x", "rejected": "c"}', "twice"),
    "another-kind": (CHAT, "field 'prompt': want a str, as in the first row"),
    "a-lost-prompt": ({"chosen": "a b", "rejected": "a c"}, "'prompt'.*as in the first row"),
    "id-out-of-range": ({"prompt_ids": [2**63], "chosen_ids": [1], "rejected_ids": [2]}, "ids'"),
    "logp-beyond-float": (
        tiny.rows(1)[0] | {"ref_chosen_logps": -(10**400), "ref_rejected_logps": -1},
        "field 'ref_chosen_logps': want a finite number",
    ),
    "truth-for-logp": (
        tiny.rows(1)[0] | {"ref_chosen_logps": True, "ref_rejected_logps": False},
        "field 'ref_chosen_logps': want a finite number, got True",
    ),
}


def test_half_a_character_anywhere_in_a_message_is_told(tmp_path):
    message = {"role": "assistant", "content": "a", "reasoning": "\ud83d"}
    path = write_lines(tmp_path / "rows.jsonl", [CHAT, CHAT | {"chosen": [message]}])
    with pytest.raises(RowError, match=r"line 2, field 'chosen\[0\].reasoning': .*Unicode"):
        load_rows(path)
    _, counts = prepare_pairs(
        load_rows(path, on_bad_rows="skip"), tiny.tokenizer(), on_bad_rows="skip"
    )
    assert (counts.pairs, counts.bad) == (1, 1)


@pytest.mark.parametrize(("line", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_told_by_file_line_and_field(line, message, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [*tiny.rows(2), line, *tiny.rows(1)])
    with pytest.raises(RowError, match=rf"rows.jsonl, line 3, .*{message}"):
        load_rows(path)
    marked = load_rows(path, on_bad_rows="skip")
    assert [row[MARK] is None for row in marked] == [True, True, False, True]
    streamed = load_rows(path, on_bad_rows="skip", streaming=True)
    for rows in (marked, streamed):
        (reason,) = (row[MARK] for row in rows if row.get(MARK))
        assert re.search(rf"rows.jsonl, line 3, .*{message}", reason)


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


def test_what_only_a_later_row_has_is_kept(tmp_path):
    logps = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    lines = [CHAT, CHAT | {"tools": [{"name": "add"}]}, CHAT | logps]
    rows = load_rows(write_lines(tmp_path / "rows.jsonl", lines))
    assert [row["tools"] for row in rows] == [None, '[{"name": "add"}]', None]
    with pytest.raises(RowError, match="row 2, field 'ref_chosen_logps'"):
        prepare_pairs(rows, tiny.tokenizer())


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [*tiny.rows(2), b"{"])
    rows = iter(load_rows(path, streaming=True))
    assert [next(rows)["prompt"], next(rows)["prompt"]] == [pair[0] for pair in tiny.PAIRS[:2]]
    with pytest.raises(RowError, match="line 3"):
        next(rows)


@pytest.mark.parametrize(
    ("between", "behind"),
    [(",,", "]"), (" ", "]"), (",", ",]"), (",", "] []"), (",", "] {"), (",", "")],
)
def test_an_array_is_one_array_of_json_and_nothing_more(between, behind, tmp_path):
    first, second = (json.dumps(row) for row in tiny.rows(2))
    (tmp_path / "rows.json").write_text(f"[{first}\n{between}{second}{behind}")
    for on_bad_rows in ("raise", "skip"):
        with pytest.raises(RowError, match="line [12]: want one array of JSON"):
            load_rows(str(tmp_path / "rows.json"), on_bad_rows=on_bad_rows)


def test_rows_of_an_array_are_told_by_the_line_they_begin_in(tmp_path):
    text = json.dumps([*tiny.rows(1), {"prompt": "a"}], indent=1)
    (tmp_path / "rows.json").write_text(text)
    line = text.split('"prompt": "a"')[0].count("\n")
    with pytest.raises(RowError, match=rf"line {line}, field 'chosen'"):
        load_rows(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(text[:-4])
    with pytest.raises(RowError, match="line .*want one array of JSON"):
        load_rows(str(tmp_path / "rows.json"), on_bad_rows="skip")


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


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5_000])
def test_what_python_cannot_read_of_an_array_is_told_by_its_line(value, tmp_path):
    first = json.dumps(tiny.rows(1)[0])
    (tmp_path / "rows.json").write_text(f'[{first},\n{{"prompt": {value}}}]')
    with pytest.raises(RowError, match="rows.json, line 2: want an object in JSON, got"):
        load_rows(str(tmp_path / "rows.json"))


def test_a_name_that_comes_twice_in_an_array_is_told(tmp_path):
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "chosen": "b", "chosen": "c"}]')
    with pytest.raises(RowError, match="line 1: .*'chosen' twice"):
        load_rows(str(tmp_path / "rows.json"))


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
    with pytest.raises(ValueError, match=name):
        list(load_rows(str(tmp_path / name), streaming=streaming))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/rows"])
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
    with pytest.raises(
        ValueError, match="want split 'train' of a single file.*folder.*, got 'test'"
    ):
        load_rows(path, split="test")
    DatasetDict({"train": Dataset.from_list(tiny.rows())}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"want one of the splits \['train'\], got 'test'"):
        load_rows(str(tmp_path / "saved"), split="test")
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match="want a file of"):
        load_rows(str(tmp_path / "rows.txt"))
    with pytest.raises(ValueError, match="want at least one row"):
        load_rows(write_lines(tmp_path / "empty.jsonl", []))
