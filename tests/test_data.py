import copy
import json
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing

from fastdpo.data import RowError, prepare_pairs

REAL_PAIRS = Path(__file__).parents[2] / "shared/data/preferences_en.jsonl"
EOS = 2


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = {
    "prompt": [user("Two and two?")],
    "chosen": [assistant("Four.")],
    "rejected": [assistant("Five.")],
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer(["Two and two make four."] * 9)


def pairs_of(rows, tokenizer, **settings):
    pairs, counts = prepare_pairs(Dataset.from_list(rows), tokenizer, **settings)
    return list(pairs), counts


def decoded(tokenizer, pair):
    return [tokenizer.decode(pair[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")]


def test_text_rows_end_with_one_eos(tokenizer):
    (pair,), _ = pairs_of([{"prompt": "a b", "chosen": " c", "rejected": " d</s>"}], tokenizer)
    assert decoded(tokenizer, pair) == ["a b", " c</s>", " d</s>"]


def test_conversations_are_rendered_by_the_template(tokenizer):
    (pair,), _ = pairs_of([CHAT], tokenizer)
    assert decoded(tokenizer, pair) == [
        "<s><|user|>Two and two?</s><|assistant|>",
        "Four.</s>",
        "Five.</s>",
    ]


def test_a_tokenizer_with_ends_of_its_own_adds_no_second(tokenizer):
    ending = copy.deepcopy(tokenizer)
    ending._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    rows = [
        {"prompt": "a b", "chosen": " c", "rejected": " d</s>"},
        {"prompt": "<s>a b", "chosen": " c", "rejected": " d"},
        CHAT,
    ]
    for row in rows:
        (pair,), _ = pairs_of([row], ending)
        for side in ("chosen_ids", "rejected_ids"):
            whole = pair["prompt_ids"] + pair[side]
            assert whole.count(1) == 1 and whole[0] == 1
            assert whole[-1] == EOS and whole[-2] != EOS


def test_tokens_merged_across_the_prompts_end_belong_to_the_completions():
    tokenizer = tiny.tokenizer(["abcd"] * 9)
    assert len(tokenizer("abcd")["input_ids"]) == 1
    (pair,), _ = pairs_of([{"prompt": "x ab", "chosen": "cd", "rejected": "c"}], tokenizer)
    for side, text in (("chosen_ids", "x abcd</s>"), ("rejected_ids", "x abc</s>")):
        assert tokenizer.decode(pair["prompt_ids"] + pair[side]) == text
        assert pair["prompt_ids"] + pair[side] == tokenizer(text)["input_ids"]


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason=f"no {REAL_PAIRS.name} beside us")
def test_real_rows_are_tokenised_as_trl_does(tokenizer):
    rows = [json.loads(line) for line in REAL_PAIRS.read_text("utf-8").splitlines()[:40]]
    pairs, counts = pairs_of(rows, tokenizer, max_length=None)
    assert counts.pairs == len(rows)

    def ids(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)["input_ids"]

    for row, pair in zip(rows, pairs, strict=True):
        prompt_ids = ids(row["prompt"], add_generation_prompt=True)
        assert pair["prompt_ids"] == prompt_ids
        for side in ("chosen", "rejected"):
            assert prompt_ids + pair[f"{side}_ids"] == ids(row["prompt"] + row[side])


IMPLICIT = {
    "conversation": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        ["<s><|user|>a</s><|assistant|>", "b</s>", "c</s>"],
    ),
    "equal-conversations": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
        ["<s><|user|>a</s><|assistant|>", "b</s>", "b</s>"],
    ),
    "text": (
        {"chosen": "it is red", "rejected": "it is blue"},
        ["it is", " red</s>", " blue</s>"],
    ),
}


@pytest.mark.parametrize(("row", "texts"), IMPLICIT.values(), ids=IMPLICIT)
def test_an_implicit_prompt_is_what_both_begin_with(row, texts, tokenizer):
    (pair,), _ = pairs_of([row], tokenizer)
    assert decoded(tokenizer, pair) == texts


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ tools }}{{ manner }}" + tokenizer.chat_template
    row = CHAT | {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"manner": "short"}}
    (pair,), _ = pairs_of([row], other)
    assert decoded(other, pair)[0].startswith("[{'name': 'add'}]short<s>")


def test_tokenised_rows_stay_as_they_are(tokenizer):
    row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    logps = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    (pair,), counts = pairs_of([row | logps], tokenizer)
    assert pair == row | logps
    assert (counts.prompt_tokens, counts.completion_tokens) == (2, 3)


def chat(**changes):
    return CHAT | changes


MALFORMED = {
    "missing-field": ({"prompt": "a", "chosen": "b"}, "rejected.*no such field"),
    "empty-field": ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt"),
    "empty-conversation": (chat(chosen=[]), "chosen"),
    "mixed-kinds": (chat(rejected="no"), "rejected"),
    "message-without-role": (chat(prompt=[{"content": "a"}]), r"prompt\[0\]"),
    "unknown-role": (chat(prompt=[{"role": "bot", "content": "a"}]), r"prompt\[0\].role.*'bot'"),
    "no-content": (chat(prompt=[{"role": "user"}]), r"prompt\[0\].content.*no content"),
    "empty-content": (chat(chosen=[assistant("")]), r"chosen\[0\].content"),
    "image": (
        chat(prompt=[{"role": "user", "content": [{"type": "image"}]}]),
        "vision-language rows are not supported",
    ),
    "system-in-the-middle": (
        chat(prompt=[user("a"), {"role": "system", "content": "b"}, user("c")]),
        r"prompt\[1\].role",
    ),
    "prompt-ends-with-assistant": (chat(prompt=[user("a"), assistant("b")]), "prompt"),
    "completion-begins-with-user": (chat(chosen=[user("a")]), "chosen"),
    "tool-before-assistant": (
        chat(prompt=[{"role": "tool", "content": "1"}]),
        r"prompt\[0\].role",
    ),
    "nothing-shared": ({"chosen": "yes", "rejected": "no"}, "prompt.*share"),
    "equal-texts-without-prompt": ({"chosen": "yes", "rejected": "yes"}, "prompt"),
    "ids-not-numbers": (
        {"prompt_ids": ["a"], "chosen_ids": ["b"], "rejected_ids": ["c"]},
        "prompt_ids",
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
def test_a_malformed_row_is_told_by_row_and_field(row, message, tokenizer):
    with pytest.raises(RowError, match=rf"train dataset, row 0, field .*{message}"):
        pairs_of([row], tokenizer)


def test_the_templates_own_objection_names_the_row(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(RowError, match="row 0, field 'prompt'.*no system, please"):
        pairs_of([CHAT], strict)


def test_conversations_need_a_chat_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="want a tokenizer with a chat template"):
        pairs_of([CHAT], bare)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_what_is_dropped_and_what_is_odd_is_counted_and_told_once(tokenizer, num_proc, caplog):
    rows = [
        *tiny.rows(3),
        {"prompt": "a b " * 50, "chosen": " c", "rejected": " d"},
        {"prompt": "a", "chosen": "", "rejected": " d"},
        {"prompt": "a", "chosen": " same", "rejected": " same"},
    ]
    kept, counts = pairs_of(rows, tokenizer, max_length=40, on_bad_rows="skip", num_proc=num_proc)
    assert (counts.rows, counts.pairs) == (6, 4) and len(kept) == 4
    assert (counts.too_long, counts.bad, counts.equal) == (1, 1, 1)
    assert counts.prompt_tokens == sum(len(pair["prompt_ids"]) for pair in kept)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "1 malformed rows" in messages[0] and "row 4, field 'chosen'" in messages[0]


def test_keep_end_drops_no_long_prompt(tokenizer):
    rows = [{"prompt": "a b " * 50, "chosen": " c", "rejected": " d"}]
    _, counts = pairs_of(rows, tokenizer, max_length=40, truncation_mode="keep_end")
    assert counts.pairs == 1


def test_where_no_row_is_left_it_is_told_why(tokenizer):
    rows = [{"prompt": "a b " * 50, "chosen": " c", "rejected": " d"}]
    with pytest.raises(ValueError, match="no row is left of 1: in 1 the prompt alone"):
        pairs_of(rows, tokenizer, max_length=40)
    with pytest.raises(ValueError, match="at least one row"):
        prepare_pairs(Dataset.from_dict({"prompt": []}), tokenizer)


def test_a_stream_is_checked_as_it_is_read(tokenizer, caplog):
    rows = [*tiny.rows(3), {"prompt": "a", "chosen": "", "rejected": " d"}, *tiny.rows(2)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    kept, counts = prepare_pairs(stream, tokenizer, on_bad_rows="skip")
    assert counts is None
    expected, _ = pairs_of([*tiny.rows(3), *tiny.rows(2)], tokenizer)
    assert list(kept) == expected
    assert sum("row 3, field 'chosen'" in r.getMessage() for r in caplog.records) == 1
    strict, _ = prepare_pairs(stream, tokenizer)
    with pytest.raises(RowError, match="row 3, field 'chosen'"):
        list(strict)
