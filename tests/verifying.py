"""Runs of `fastdpo verify` on tiny models and preference rows, and the table that they print."""

import tiny

from fastdpo import cli
from fastdpo.collate import LAYOUTS
from fastdpo.parser import VerifyParser
from fastdpo.subject import load_subject


def folder_with_models_and_rows(folder):
    """`folder`, with two tiny models and 8 preference rows."""
    tokenizer = tiny.tokenizer(text for pair in tiny.PAIRS for text in pair)
    for family in ("llama", "gemma2"):
        save(tiny.model(family, len(tokenizer)), folder / family)
    tiny.write_rows(folder / "rows.jsonl", tiny.rows())
    return folder


def save(model, path):
    tiny.tokenizer(text for pair in tiny.PAIRS for text in pair).save_pretrained(path)
    model.save_pretrained(path)


def run(here, *more, model="llama", rows="rows.jsonl"):
    names = ("--model_name_or_path", str(here / model), "--dataset_name", str(here / rows))
    return cli.main(["verify", *names, "--use_cpu", "True", *more])


def load(here, *more, rows="rows.jsonl"):
    """The subject that `fastdpo verify` would look at."""
    names = ("--model_name_or_path", str(here / "llama"), "--dataset_name", str(here / rows))
    parser = VerifyParser("fastdpo verify")
    run, max_pairs, _ = parser.parse([*names, "--use_cpu", "True", *more])
    return load_subject(run, max_pairs)


def table(capsys):
    """What was printed: {(layout, first word of what was compared): its line}."""
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(LAYOUTS)]
    return {tuple(line.split()[:2]): line for line in rows}


def what_differs(capsys):
    return {at: line for at, line in table(capsys).items() if "DIFFERS" in line}
