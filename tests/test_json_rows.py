"""json_rows: lines and arrays of JSON; what is wrong in a row is told by its line and field."""

import json
import re

import pytest
import tiny
from pairs import CHAT, assistant, decoded, user
from row_files import texts, write_lines

from fastdpo.data import prepare_pairs
from fastdpo.preferences import MALFORMED as MARK
from fastdpo.row_errors import RowError
from fastdpo.rows import load_rows

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
    "another-kind": (CHAT, "field 'prompt': want a str, as in the rows before"),
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


@pytest.mark.parametrize(("line", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_reported_by_file_line_and_field(line, message, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [*tiny.rows(2), line, *tiny.rows(1)])
    with pytest.raises(RowError, match=rf"rows.jsonl, line 3, .*{message}"):
        load_rows(path)
    marked = load_rows(path, on_bad_rows="skip")
    assert [row[MARK] is None for row in marked] == [True, True, False, True]
    streamed = load_rows(path, on_bad_rows="skip", streaming=True)
    for rows in (marked, streamed):
        (reason,) = (row[MARK] for row in rows if row.get(MARK))
        assert re.search(rf"rows.jsonl, line 3, .*{message}", reason)


def test_half_a_character_anywhere_in_a_message_is_reported(tmp_path):
    message = {"role": "assistant", "content": "a", "reasoning": "\ud83d"}
    path = write_lines(tmp_path / "rows.jsonl", [CHAT, CHAT | {"chosen": [message]}])
    with pytest.raises(RowError, match=r"line 2, field 'chosen\[0\].reasoning': .*Unicode"):
        load_rows(path)
    _, counts = prepare_pairs(
        load_rows(path, on_bad_rows="skip"), tiny.tokenizer(), on_bad_rows="skip"
    )
    assert (counts.pairs, counts.bad) == (1, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_not_there_are_reported(streaming, tmp_path):
    row = {"prompt": "a", "chosen": "it is", "rejected": "it was"}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=r"jsonl: want the columns .*, line 1 has no \['promt'"):
        list(load_rows(path, columns=["promt", "chosen", "rejected"], streaming=streaming))


def test_options_that_are_read_may_be_in_later_rows_alone(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [CHAT, CHAT | {"tools": [{"name": "add"}]}])
    rows = load_rows(path, columns=[*CHAT, "tools"])
    assert rows["tools"][:] == [None, '[{"name": "add"}]']


def test_tools_need_not_be_alike(tmp_path):
    tools = [[{"name": "add"}], [{"name": "look", "far": {"deep": [1, "two"]}}]]
    path = write_lines(tmp_path / "rows.jsonl", [CHAT | {"tools": each} for each in tools])
    assert [json.loads(row["tools"]) for row in load_rows(path)] == tools


def test_a_key_that_is_null_is_as_one_left_out(tmp_path):
    sides = {
        "chosen": [user("a") | {"name": None}, assistant("b")],
        "rejected": [user("a"), assistant("c")],
    }
    rows = load_rows(write_lines(tmp_path / "rows.jsonl", [sides]))
    (pair,) = prepare_pairs(rows, tokenizer := tiny.tokenizer())[0]
    assert decoded(tokenizer, pair)[0] == "<s><|user|>a</s><|assistant|>"


def test_rows_of_token_ids_may_be_among_texts(tmp_path):
    lines = [*tiny.rows(1), tiny.ID_PAIRS[0]]
    pairs, _ = prepare_pairs(
        load_rows(write_lines(tmp_path / "rows.jsonl", lines)), tiny.tokenizer()
    )
    assert pairs[1] == tiny.ID_PAIRS[0]


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


def test_blank_lines_are_no_rows_and_count_as_lines(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [b"", *tiny.rows(1), b" \t", *tiny.rows(1), b""])
    assert texts(load_rows(path)) == 2 * tiny.rows(1)
    write_lines(tmp_path / "rows.jsonl", [*tiny.rows(1), b"", b"{"])
    with pytest.raises(RowError, match="rows.jsonl, line 3"):
        load_rows(path)


def test_an_array_may_follow_blank_lines_and_has_to_be_in_utf8(tmp_path):
    text = "\n \n" + json.dumps(tiny.rows(2), indent=0)
    (tmp_path / "rows.json").write_text(text)
    assert texts(load_rows(str(tmp_path / "rows.json"))) == tiny.rows(2)
    (tmp_path / "rows.json").write_bytes(text.encode().replace(b" Paris", b"\xff"))
    with pytest.raises(RowError, match="rows.json, line 6: want UTF-8"):
        load_rows(str(tmp_path / "rows.json"), on_bad_rows="skip")


def test_rows_of_an_array_are_reported_by_the_line_they_begin_in(tmp_path):
    text = json.dumps([*tiny.rows(1), {"prompt": "a"}], indent=1)
    (tmp_path / "rows.json").write_text(text)
    line = text.split('"prompt": "a"')[0].count("\n")
    with pytest.raises(RowError, match=rf"line {line}, field 'chosen'"):
        load_rows(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(text[:-4])
    with pytest.raises(RowError, match="line .*want one array of JSON"):
        load_rows(str(tmp_path / "rows.json"), on_bad_rows="skip")


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5_000])
def test_what_python_cannot_read_of_an_array_is_reported_by_its_line(value, tmp_path):
    first = json.dumps(tiny.rows(1)[0])
    (tmp_path / "rows.json").write_text(f'[{first},\n{{"prompt": {value}}}]')
    with pytest.raises(RowError, match="rows.json, line 2: want an object in JSON, got"):
        load_rows(str(tmp_path / "rows.json"))


def test_a_name_that_comes_twice_in_an_array_is_reported(tmp_path):
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "chosen": "b", "chosen": "c"}]')
    with pytest.raises(RowError, match="line 1: .*'chosen' twice"):
        load_rows(str(tmp_path / "rows.json"))
