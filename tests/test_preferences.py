"""A row by itself: what is malformed, and where a prompt ends that is not given apart."""

import pytest
import tiny
from pairs import assistant, chat, decoded, merging_tokenizer, pairs_of, user

from fastdpo.columns import ID_COLUMNS
from fastdpo.preferences import checked_row
from fastdpo.row_errors import FieldError, RowError


@pytest.fixture(scope="module")
def tokenizer():
    return merging_tokenizer()


CALL = [user("a"), assistant("f"), {"role": "ipython", "content": "1"}]
IMPLICIT = {
    "conversation": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        ["<s><|user|>a</s><|assistant|>", "b</s>", "c</s>"],
    ),
    "equal-conversations": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
        ["<s><|user|>a</s><|assistant|>", "b</s>", "b</s>"],
    ),
    "one-conversation-is-the-beginning-of-the-other": (
        {
            "chosen": [*CALL, assistant("b")],
            "rejected": [*CALL, assistant("b"), user("c"), assistant("d")],
        },
        [
            "<s><|user|>a</s><|assistant|>f</s><|ipython|>1</s><|assistant|>",
            "b</s>",
            "b</s><|user|>c</s><|assistant|>d</s>",
        ],
    ),
    "text": (
        {"chosen": "it is red", "rejected": "it is blue"},
        ["it is", " red</s>", " blue</s>"],
    ),
    "one-text-is-the-beginning-of-the-other": (
        {"chosen": "it is red", "rejected": "it is"},
        ["it is", " red</s>", "</s>"],
    ),
    "equal-texts": ({"chosen": "yes", "rejected": "yes"}, ["yes", "</s>", "</s>"]),
}


@pytest.mark.parametrize(("row", "texts"), IMPLICIT.values(), ids=IMPLICIT)
def test_an_implicit_prompt_is_what_both_begin_with(row, texts, tokenizer):
    (pair,), _ = pairs_of([row], tokenizer)
    assert decoded(tokenizer, pair) == texts


MALFORMED = {
    "missing-field": ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected.*got none"),
    "no-prompt-in-a-column-of-prompts": (
        {"prompt": None, "chosen": "The cat sat", "rejected": "The dog ran"},
        "prompt.*got None",
    ),
    "images": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "images": ["cat.png"]},
        "images.*vision-language rows are not supported yet",
    ),
    "empty-conversation": (chat(chosen=[]), "chosen"),
    "tools-not-a-list": (chat(tools='{"name": "add"}'), "tools.*want a list or one as JSON text"),
    "mixed-kinds": (chat(rejected="no"), "rejected"),
    "message-without-role": (chat(prompt=[{"content": "a"}]), r"prompt\[0\]"),
    "no-role": (chat(prompt=[{"role": "", "content": "a"}]), r"prompt\[0\].role.*got ''"),
    "no-content": (chat(prompt=[{"role": "user"}]), r"prompt\[0\].content.*no content"),
    "content-a-number": (
        chat(prompt=[{"role": "user", "content": 5}]),
        r"prompt\[0\].content.*want text, got 5",
    ),
    "part-without-text": (
        chat(prompt=[{"role": "user", "content": [{"type": "text"}]}]),
        r"prompt\[0\].content.*want text, got None",
    ),
    "image": (
        chat(prompt=[{"role": "user", "content": [{"type": "image"}]}]),
        "vision-language rows are not supported",
    ),
    "completion-goes-on-as-the-user": (
        chat(chosen=[user("Two and two?"), assistant("Four.")]),
        "chosen.*another role than 'user'",
    ),
    "messages-as-pandas-writes-them": (
        {"prompt": "a", "chosen": "[{'role': 'user', 'c", "rejected": "[{'content': 'b'"},
        "chosen.*want messages as a list .in a CSV file as JSON., not as text",
    ),
    "messages-as-json": (
        dict.fromkeys(("prompt", "chosen", "rejected"), '[{"role": "user", "content": "a"}]'),
        "chosen.*want messages as a list",
    ),
    "nothing-shared": ({"chosen": "yes", "rejected": "no"}, "prompt.*share, got none$"),
    "its-own-no": (
        {"prompt": ["no text"], "chosen": ["a"], "rejected": ["b"]},
        r"prompt\[0\].*got 'no text'$",
    ),
    "ids-not-numbers": (
        {"prompt_ids": ["a"], "chosen_ids": ["b"], "rejected_ids": ["c"]},
        "prompt_ids",
    ),
    "ids-truths": (
        {"prompt_ids": [True], "chosen_ids": [True], "rejected_ids": [False]},
        "prompt_ids.*whole numbers from 0, got True",
    ),
    "ids-negative": ({"prompt_ids": [1], "chosen_ids": [-1], "rejected_ids": [2]}, "chosen_ids"),
    "ids-too-large": ({"prompt_ids": [1], "chosen_ids": [9999], "rejected_ids": [2]}, "9999"),
    "ids-empty": ({"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]}, "chosen_ids"),
    "one-reference-logp": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1.0},
        "ref_rejected_logps",
    ),
    "logp-not-finite": (
        {
            "prompt": "a",
            "chosen": "b",
            "rejected": "c",
            "ref_chosen_logps": float("nan"),
            "ref_rejected_logps": 0.0,
        },
        "ref_chosen_logps.*finite",
    ),
}


@pytest.mark.parametrize(("row", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_reported_by_row_and_field(row, message, tokenizer):
    with pytest.raises(RowError, match=rf"train dataset, row 0, field .*{message}"):
        pairs_of([row], tokenizer)


def test_completions_may_be_messages_in_json_where_the_prompt_asks_for_them(tokenizer):
    sides = {side: f'[{{"role": "user", "content": "{side}"}}]' for side in ("chosen", "rejected")}
    assert pairs_of([{"prompt": "In JSON: "} | sides], tokenizer)[1].pairs == 1


def test_rows_without_an_image_need_not_lack_the_column(tokenizer):
    rows = [tiny.rows(1)[0] | {"images": []}]
    assert pairs_of(rows, tokenizer)[1].pairs == 1


def of(role, **message):
    return {"role": role, **(message or {"content": "d"})}


@pytest.mark.parametrize(
    "turns",
    [
        chat(prompt=[of("system"), of("developer"), user("a")]),
        chat(prompt=[user("a"), of("system"), user("b")]),
        chat(prompt=[of("documents"), user("a"), of("tool")]),
        chat(prompt=[of("system")], chosen=[user("a"), assistant("b")]),
        chat(chosen=[of("tool"), assistant("b")]),
        chat(chosen=[of("assistant", content=None, reasoning_content="c"), assistant("b")]),
    ],
    ids=["two-systems", "system-later", "other-roles", "user-first", "tool-first", "reasoning"],
)
def test_the_order_of_turns_is_the_templates_to_judge(turns, tokenizer):
    assert pairs_of([turns], tokenizer)[1].pairs == 1


def test_texts_go_before_token_ids_which_may_be_another_tokenizers(tokenizer):
    rows = tiny.rows(2)
    with_ids = [row | {name: [5, 6] for name in ID_COLUMNS} for row in rows]
    assert pairs_of(with_ids, tokenizer) == pairs_of(rows, tokenizer)


def test_token_ids_count_from_0_to_what_int64_holds():
    row = {"prompt_ids": [0], "chosen_ids": [0, 1], "rejected_ids": [2**63 - 1]}
    assert checked_row(row) == row
    for wrong in (-1, 2**63, True):
        with pytest.raises(FieldError, match=f"want token ids, whole numbers from 0, got {wrong}"):
            checked_row(row | {"rejected_ids": [wrong]})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (chat(prompt="Two and two?"), "'prompt': want a list, as chosen is, got 'Two and two"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected': want a text or .*, got 3"),
    ],
    ids=["prompt", "rejected"],
)
def test_a_field_of_another_kind_is_shown(row, told):
    with pytest.raises(FieldError, match=told):
        checked_row(row)


def test_a_completion_may_begin_as_the_user_where_the_prompt_does_not_end_so():
    turns = {"chosen": [user("c"), assistant("d")], "rejected": [assistant("e")]}
    assert checked_row(chat(prompt=[user("a"), assistant("b")], **turns))
    with pytest.raises(FieldError, match="'chosen': want a first message of another role"):
        checked_row(chat(prompt=[assistant("a"), user("b")], **turns))


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_messages_of_every_field_are_looked_at(field):
    with pytest.raises(FieldError, match=rf"'{field}\[1\]': want a message with 'role'"):
        checked_row(chat(**{field: [assistant("a"), {"content": "b"}]}))
