"""csv_rows: cells as texts, conversations among them, and what is wrong in a file."""

import json

import pytest
import tiny
from datasets import Dataset
from pairs import CHAT
from row_files import texts

from fastdpo.data import prepare_pairs
from fastdpo.row_errors import RowError
from fastdpo.rows import load_rows


def test_csv_cells_may_hold_conversations(tmp_path):
    Dataset.from_list([{k: json.dumps(v) for k, v in CHAT.items()}]).to_csv(tmp_path / "rows.csv")
    assert texts(load_rows(str(tmp_path / "rows.csv"))) == [CHAT]


def test_a_csv_cells_json_may_be_indented(tmp_path):
    cells = {name: json.dumps(messages, indent=1) for name, messages in CHAT.items()}
    Dataset.from_list([cells]).to_csv(tmp_path / "rows.csv")
    assert texts(load_rows(str(tmp_path / "rows.csv"))) == [CHAT]


def test_a_csv_cell_that_is_no_json_is_reported_or_counted(tmp_path):
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


def test_a_broken_csv_cell_beside_messages_is_reported_whatever_their_first_key(tmp_path):
    row = {k: json.dumps([dict(reversed(m.items())) for m in v]) for k, v in CHAT.items()}
    Dataset.from_list([row, row | {"chosen": "[{"}]).to_csv(tmp_path / "rows.csv")
    with pytest.raises(RowError, match=r"rows.csv, row 1, field 'chosen': want JSON"):
        load_rows(str(tmp_path / "rows.csv"))


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


def test_a_csv_file_may_have_blank_lines_and_cells_of_many_lines_or_characters(tmp_path):
    cells = f'"a\r\nb",{"c" * 200_000},d'
    (tmp_path / "rows.csv").write_bytes(
        f"prompt,chosen,rejected\r\n\r\n{cells}\r\n \n,,\n".encode()
    )
    first, second = texts(load_rows(str(tmp_path / "rows.csv")))
    assert first == {"prompt": "a\r\nb", "chosen": "c" * 200_000, "rejected": "d"}
    assert set(second.values()) == {None}  # a line of commas is a row


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
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\n1,a,b,c\n2,a\n3,a,b\n")
    path = str(tmp_path / "rows.csv")
    with pytest.raises(RowError, match=r"rows.csv, row 0: want 3 fields, as in the header, got 4"):
        list(load_rows(path, streaming=streaming))
    rows = list(load_rows(path, streaming=streaming, on_bad_rows="skip"))
    assert [row["prompt"] for row in rows] == [None, None, "3"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_csv_files_has_texts_in_their_cells_too(streaming, tmp_path):
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\n1,007,NA\n2,1e3,null\n")
    rows = list(load_rows(str(tmp_path), streaming=streaming))
    assert [row["chosen"] for row in rows] == ["007", "1e3"]
    assert [row["rejected"] for row in rows] == ["NA", "null"]
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\n1,a,b,c\n2,d,e,f\n")
    with pytest.raises(RowError, match="train.csv, row 0: want 3 fields, as in the header, got 4"):
        list(load_rows(str(tmp_path), streaming=streaming))


def test_a_name_that_comes_twice_in_a_csv_header_is_reported(tmp_path):
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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_row_of_another_kind_is_reported_or_counted(streaming, tmp_path):
    chat = {k: json.dumps(v) for k, v in CHAT.items()}
    path = str(tmp_path / "rows.csv")
    for rows in ([chat, *tiny.rows(1), chat], [*tiny.rows(1), chat, *tiny.rows(1)]):
        Dataset.from_list(rows).to_csv(path)
        with pytest.raises(RowError, match=r"rows.csv, row 1, field 'prompt': want a (list|str), "):
            list(load_rows(path, streaming=streaming))
        read = load_rows(path, streaming=streaming, on_bad_rows="skip")
        pairs, counts = prepare_pairs(read, tiny.tokenizer(), on_bad_rows="skip")
        assert len(list(pairs)) == 2
        assert streaming or counts.bad == 1
