"""Rows of text, conversations and token ids as tokenised pairs."""

import copy
import json

import datasets
import pytest
import tiny
from datasets import Dataset, Features, List, Value
from pairs import CHAT, assistant, chat, decoded, merging_tokenizer, pairs_of, user, with_ends
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from bench.cases import no_real_pairs
from bench.length_profiles import REAL_PAIRS
from fastdpo.columns import ID_COLUMNS
from fastdpo.data import prepare_pairs
from fastdpo.preferences import MALFORMED, ORIGIN
from fastdpo.row_errors import RowError
from fastdpo.rows import as_dataset, in_one_schema


@pytest.fixture(scope="module")
def tokenizer():
    return merging_tokenizer()


def test_text_rows_end_with_one_eos(tokenizer):
    (pair,), _ = pairs_of([{"prompt": "a b", "chosen": " c", "rejected": " d</s>"}], tokenizer)
    assert decoded(tokenizer, pair) == ["a b", " c</s>", " d</s>"]


def test_text_that_no_token_can_end_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="want a tokenizer with an eos_token for rows of text"):
        pairs_of(tiny.rows(1), endless)


def test_conversations_are_rendered_by_the_template(tokenizer):
    (pair,), _ = pairs_of([CHAT], tokenizer)
    assert decoded(tokenizer, pair) == [
        "<s><|user|>Two and two?</s><|assistant|>",
        "Four.</s>",
        "Five.</s>",
    ]


def test_a_tokenizer_with_ends_of_its_own_adds_no_second(tokenizer):
    ending, bos, eos = with_ends(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [
        {"prompt": "a b", "chosen": " c", "rejected": " d</s>"},
        {"prompt": "<s>a b", "chosen": " c", "rejected": " d"},
        CHAT,
    ]
    for row in rows:
        (pair,), _ = pairs_of([row], ending)
        for side in ("chosen_ids", "rejected_ids"):
            whole = pair["prompt_ids"] + pair[side]
            assert whole.count(bos) == 1 and whole[0] == bos
            assert whole[-1] == eos and whole[-2] != eos


def test_ends_that_a_text_itself_has_twice_stay(tokenizer):
    rows = [
        {"prompt": "a</s></s>", "chosen": "b", "rejected": " c</s></s>"},
        {"prompt": "<s><s>a</s>", "chosen": "", "rejected": "b"},
    ]
    (first, second), _ = pairs_of(rows, tokenizer)
    assert decoded(tokenizer, first) == ["a</s></s>", "b</s>", " c</s></s>"]
    assert decoded(tokenizer, second) == ["<s><s>a</s>", "</s>", "b</s>"]
    (of_chat,), _ = pairs_of([chat(chosen=[assistant("b</s>")])], with_ends(tokenizer))
    assert decoded(tokenizer, of_chat)[1] == "b</s></s>"


def test_a_vocabulary_may_have_holes_and_no_unknown_token(tokenizer):
    holes = Tokenizer(WordLevel({"x": 0, "y": 5, "</s>": 9}))
    holes.pre_tokenizer = Whitespace()
    holes = PreTrainedTokenizerFast(tokenizer_object=holes, eos_token="</s>")
    ids = {"prompt_ids": [0], "chosen_ids": [9], "rejected_ids": [5]}
    for row in ({"prompt": "x", "chosen": " x", "rejected": " y"}, ids):
        assert pairs_of([row], holes)[1].pairs == 1
    with pytest.raises(RowError, match="field 'rejected_ids': want token ids below 10, got 10"):
        pairs_of([ids | {"rejected_ids": [10]}], holes)


def test_the_vocabulary_is_made_once_for_all_rows(tokenizer, monkeypatch):
    made = []
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: made.append(1) or {"x": 9})
    assert pairs_of([{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}] * 200, tokenizer)
    assert len(made) == 1


def test_reference_logps_that_are_nowhere_are_none(tokenizer):
    row = tiny.rows(1)[0] | {"ref_chosen_logps": None, "ref_rejected_logps": None}
    pairs, _ = pairs_of([row] * 3, tokenizer)
    assert "ref_chosen_logps" not in pairs[0]


def test_a_row_that_alone_has_reference_logps_is_the_one_that_is_bad(tokenizer):
    rows = [row | {"ref_chosen_logps": None, "ref_rejected_logps": None} for row in tiny.rows(3)]
    rows[2] |= {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    with pytest.raises(RowError, match="row 2, field 'ref_chosen_logps': want none"):
        pairs_of(rows, tokenizer)
    pairs, counts = pairs_of(rows, tokenizer, on_bad_rows="skip")
    assert (len(pairs), counts.bad) == (2, 1) and "ref_chosen_logps" not in pairs[0]


def test_a_row_without_a_reference_among_rows_that_have_one_is_malformed(tokenizer):
    rows = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in tiny.rows(3)]
    rows[1] |= {"ref_chosen_logps": None, "ref_rejected_logps": None}
    with pytest.raises(RowError, match="row 1, field 'ref_chosen_logps': want a number, as other"):
        pairs_of(rows, tokenizer)
    pairs, counts = pairs_of(rows, tokenizer, on_bad_rows="skip")
    assert counts.bad == 1 and [pair["ref_chosen_logps"] for pair in pairs] == [-1.0, -1.0]


def test_reference_logps_count_in_the_rows_that_were_selected(tokenizer):
    rows = [row | {"ref_chosen_logps": None, "ref_rejected_logps": None} for row in tiny.rows(5)]
    rows[4] |= {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    dataset = Dataset.from_list(rows)
    scored = dataset.filter(lambda row: row["ref_chosen_logps"] is not None)
    assert prepare_pairs(scored, tokenizer)[0]["ref_rejected_logps"] == [-2.0]
    assert "ref_chosen_logps" not in prepare_pairs(dataset.select(range(4)), tokenizer)[0][0]


DEEP = "[" * 100_000


@pytest.mark.parametrize("field", ["tools", "chat_template_kwargs", "prompt"])
def test_json_that_is_too_deep_is_reported_by_row_and_field(tokenizer, field):
    with pytest.raises(RowError, match=f"row 0, field '{field}"):
        pairs_of([chat(**{field: [DEEP] if field == "prompt" else DEEP})], tokenizer)


def test_tokens_merged_across_the_prompts_end_belong_to_the_completions():
    tokenizer = tiny.tokenizer(["abcd"] * 9)
    assert len(tokenizer("abcd")["input_ids"]) == 1
    (pair,), _ = pairs_of([{"prompt": "x ab", "chosen": "cd", "rejected": "c"}], tokenizer)
    for side, text in (("chosen_ids", "x abcd</s>"), ("rejected_ids", "x abc</s>")):
        assert tokenizer.decode(pair["prompt_ids"] + pair[side]) == text
        assert pair["prompt_ids"] + pair[side] == tokenizer(text)["input_ids"]


@no_real_pairs
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


AS_TRL = {  # rows that look odd, and train as in TRL
    "empty-completion": (
        {"prompt": "a b", "chosen": " c", "rejected": ""},
        ["a b", " c</s>", "</s>"],
    ),
    "empty-turn": (
        CHAT | {"rejected": [assistant("")]},
        ["<s><|user|>Two and two?</s><|assistant|>", "Four.</s>", "</s>"],
    ),
    "a-prompt-that-ends-with-the-assistant": (
        CHAT | {"prompt": [user("a"), assistant("b")]},
        ["<s><|user|>a</s><|assistant|>b</s><|assistant|>", "Four.</s>", "Five.</s>"],
    ),
}


@pytest.mark.parametrize(("row", "texts"), AS_TRL.values(), ids=AS_TRL)
def test_odd_rows_that_trl_trains_on_are_tokenised_as_there(row, texts, tokenizer):
    (pair,), _ = pairs_of([row], tokenizer)
    assert decoded(tokenizer, pair) == texts


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ tools }}{{ manner }}" + tokenizer.chat_template
    row = CHAT | {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"manner": "short"}}
    (pair,), _ = pairs_of([row], other)
    assert decoded(other, pair)[0].startswith("[{'name': 'add'}]short<s>")


def test_no_tools_and_none_are_distinguished_and_a_templates_own_arguments_win(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ tools is none }}{{ tools }}" + tokenizer.chat_template
    own = '{"tools": [{"name": "add"}]}'
    rows = [
        chat(tools="[]", chat_template_kwargs=None),
        CHAT,
        chat(chat_template_kwargs=own),
    ]
    pairs, _ = pairs_of(rows, other)
    texts = [decoded(other, pair)[0].partition("<s>")[0] for pair in pairs]
    assert texts == ["False[]", "TrueNone", "False[{'name': 'add'}]"]


def test_arguments_of_other_rows_tools_are_in_no_rows_text(tokenizer):
    other = copy.deepcopy(tokenizer)
    call = "{% for m in messages %}{{ m.tool_calls }}{% endfor %}"
    other.chat_template = "{{ tools }}{{ manner }}" + call + "<s>" + tokenizer.chat_template
    rows = []
    for name, argument in (("look", "place"), ("find", "word")):
        calls = [{"name": name, "arguments": {argument: "x"}}]
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        own = {"tools": [{"name": name, "wants": {argument: "text"}}]}
        own["chat_template_kwargs"] = {"manner": name, argument: "x"}
        rows.append(CHAT | own | {"chosen": [message], "rejected": CHAT["rejected"]})
    stored = Dataset.from_list(rows)  # each row now has the keys of both
    assert stored[0]["tools"][0]["wants"] == {"place": "text", "word": None}
    pairs, _ = prepare_pairs(stored, other, max_length=None)
    for row, pair in zip(rows, pairs, strict=True):
        text = "".join(decoded(other, pair)[:2]).replace("<s>", " ")
        assert str(row["tools"]) in text and str(row["chosen"][0]["tool_calls"]) in text


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets 4 has no Json")
@pytest.mark.parametrize("kind", ["one", "stream", "mixture"])
def test_nulls_that_a_user_wrote_in_json_stay_and_those_of_arrow_go(tokenizer, kind):
    any_json, text = datasets.Json(), Value("string")
    call = {"name": text, "arguments": any_json}
    message = {"role": text, "content": text, "tool_calls": List(call)}
    features = {"prompt": List(message), "chosen": List(message), "rejected": [message]}
    calls = [{"name": "look", "arguments": {"place": None, "near": [None, {"at": None}]}}]
    tools = [{"name": "look", "wants": {"place": {"default": None, "enum": [None, "a"]}}}]
    row = CHAT | {"chosen": [{"role": "assistant", "tool_calls": calls}], "tools": tools}
    dataset = Dataset.from_list([row], features=Features(features | {"tools": any_json}))
    assert dataset[0]["prompt"][0]["tool_calls"] is None  # added by Arrow
    if kind == "mixture":
        dataset = in_one_schema(dataset, "rows", skip_bad=False)
    dataset = dataset.to_iterable_dataset() if kind == "stream" else dataset
    showing = copy.deepcopy(tokenizer)
    showing.chat_template = "{{ tools }}{% for m in messages %}{{ m }}{% endfor %}{{ eos_token }}"
    (pair,), _ = prepare_pairs(dataset, showing, max_length=None)
    prompt, chosen, _ = decoded(showing, pair)
    said = "".join(map(str, [tools, *row["prompt"], *row["chosen"]]))
    assert prompt + chosen == f"{said}</s>"


def test_a_transform_of_the_rows_is_kept(tokenizer):
    rows = Dataset.from_list([{"q": "Two and", "a": " two", "b": " 2"}] * 3)

    def transformed(batch):
        names = {"prompt": "q", "chosen": "a", "rejected": "b"}
        return {name: [text.upper() for text in batch[q]] for name, q in names.items()}

    for keep_columns in (False, True):
        settings = {"keep_columns": keep_columns}
        pairs, counts = prepare_pairs(rows.with_transform(transformed), tokenizer, **settings)
        assert decoded(tokenizer, pairs[2]) == ["TWO AND", " TWO</s>", " 2</s>"]
        assert counts.rows == 3 and pairs.format["type"] is None
        assert pairs.column_names == [*ID_COLUMNS]


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow"])
@pytest.mark.parametrize("streamed", [False, True], ids=["kept", "streamed"])
def test_rows_of_any_format_are_read(tokenizer, kind, streamed):
    for rows in (tiny.rows(3), [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]}]):
        dataset = Dataset.from_list(rows)
        formatted = (dataset.to_iterable_dataset() if streamed else dataset).with_format(kind)
        assert list(prepare_pairs(formatted, tokenizer)[0]) == pairs_of(rows, tokenizer)[0]


def test_columns_that_no_one_asked_for_have_any_name(tokenizer):
    rows = [row | {"malformed": False, "status": 3, "note": "x"} for row in tiny.rows(2)]
    assert pairs_of(rows, tokenizer) == pairs_of(tiny.rows(2), tokenizer)


def test_rows_need_not_be_as_many_as_the_processes(tokenizer, caplog):
    assert pairs_of(tiny.rows(1), tokenizer, num_proc=4)[1].pairs == 1
    assert not caplog.text


def test_columns_that_are_kept_are_the_rows_own(tokenizer):
    own = {"id": 7, MALFORMED: None, ORIGIN: "a.csv, row 0"}
    (pair,), _ = pairs_of([tiny.rows(1)[0] | own], tokenizer, keep_columns=True)
    assert pair.keys() == {*tiny.rows(1)[0], *ID_COLUMNS, "id"}


def test_tokenised_rows_stay_as_they_are(tokenizer):
    row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    logps = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    (pair,), counts = pairs_of([row | logps], tokenizer)
    assert pair == row | logps
    assert (counts.prompt_tokens, counts.completion_tokens) == (2, 3)


@pytest.mark.parametrize("rows", [tiny.rows(), "rows", None], ids=["list", "name", "none"])
def test_what_is_no_dataset_is_refused(tokenizer, rows):
    kind = type(rows).__name__
    with pytest.raises(TypeError, match=f"eval_a dataset: want a datasets.Dataset .* got {kind}"):
        prepare_pairs(rows, tokenizer, name="eval_a")


@pytest.mark.parametrize("stream", [False, True], ids=["kept", "streamed"])
def test_columns_of_another_name_are_named(tokenizer, stream):
    rows = Dataset.from_list([{"instruction": "a", "output": "b"}])
    wanted = r"want the columns chosen and rejected.*got \['instruction', 'output'\]"
    with pytest.raises(ValueError, match=f"train dataset: {wanted}"):
        prepare_pairs(rows.to_iterable_dataset() if stream else rows, tokenizer)


OBJECTIONS = {  # what a template says, and may stumble over
    "{{ raise_exception('no, please') }}": "'prompt'.*no, please",
    "{% if 'Four.' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}": "'chosen'",
    "{% if 'Five.' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}": "'rejected'",
    "{{ 1 // (messages | length - 1) }}": "'prompt'.*ZeroDivisionError",
    "{{ '{x}'.format() }}": "'prompt'.*KeyError",
}


@pytest.mark.parametrize(("template", "message"), OBJECTIONS.items(), ids=OBJECTIONS.values())
def test_the_templates_own_objection_names_row_and_field(tokenizer, template, message):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = template + tokenizer.chat_template
    with pytest.raises(RowError, match=f"row 0, field {message}"):
        pairs_of([CHAT], strict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": ["add"]}, "ValueError: Tools should"),
        ({"chat_template_kwargs": '{"manner": "\\ud83d"}'}, "no Unicode"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "TypeError"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "ValueError"),
    ],
    ids=["tools", "half a character", "an argument of ours", "no such end"],
)
def test_options_that_cannot_be_rendered_name_the_row_or_are_skipped(tokenizer, options, message):
    manners = copy.deepcopy(tokenizer)
    manners.chat_template = "{{ manner }}" + tokenizer.chat_template
    with pytest.raises(RowError, match=f"row 0, field 'prompt': .*{message}"):
        pairs_of([chat(**options)], manners)
    _, counts = pairs_of([chat(**options), CHAT], manners, on_bad_rows="skip")
    assert (counts.pairs, counts.bad) == (1, 1)


def test_what_the_template_cannot_add_up_names_the_row(tokenizer):
    adding = copy.deepcopy(tokenizer)
    adding.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    parts = chat(prompt=[user([{"type": "text", "text": "a quéstion"}])])
    told = (
        "row 0, field 'prompt': want what the chat template takes, got TypeError: can only "
        r'concatenate str \(not "list"\) to str$'
    )
    with pytest.raises(RowError, match=told):
        pairs_of([parts], adding)
    told = r"row 0, field 'prompt': want content as text, .* got \[\{'type': 'text', 'text': 'a q"
    with pytest.raises(RowError, match=told):
        pairs_of([parts], tokenizer)
    for instead in ("", "{{ message['content'] | tojson }}"):
        wants_text = copy.deepcopy(tokenizer)
        wants_text.chat_template = tokenizer.chat_template.replace(
            "{{ message['content'] }}",
            "{% if message['content'] is string %}{{ message['content'] }}"
            f"{{% else %}}{instead}{{% endif %}}",
        )
        with pytest.raises(RowError, match=told):
            pairs_of([parts], wants_text)


def test_a_template_may_leave_out_reasoning_and_write_what_a_tool_says_as_json(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
        "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
        "{% elif m.role == 'user' %}{{ m.content[0].text | trim }}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "why"}]
    turns = [
        user([{"type": "text", "text": " a\n"}]),
        {"role": "assistant", "content": parts},
        {"role": "tool", "content": parts},
    ]
    (pair,) = prepare_pairs(as_dataset([chat(prompt=turns)]), own)[0]
    assert decoded(own, pair) == [f"a{json.dumps(parts)}", "Four.", "Five."]


def test_conversations_need_a_chat_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="want a tokenizer with a chat template"):
        pairs_of([CHAT], bare)


def test_lengths_are_those_of_the_rows_kept(tokenizer):
    rows = [{"prompt": "a b " * 50, "chosen": " c", "rejected": " d"}, *tiny.rows(2)]
    pairs, counts = pairs_of(rows, tokenizer, max_length=40, length_column="length")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [pair["length"] for pair in pairs] == [
        sum(len(pair[name]) for name in names) for pair in pairs
    ]
    assert sum(pair["length"] for pair in pairs) == counts.prompt_tokens + counts.completion_tokens
