"""Short runs of `fastdpo train`, on a tiny model and preference rows in a folder."""

import tiny

from fastdpo import cli


def folder_with_model_and_rows(folder):
    """`folder`, with a tiny model in model/ and 16 preference rows in rows.jsonl."""
    tokenizer = tiny.tokenizer(text for pair in tiny.PAIRS for text in pair)
    tokenizer.save_pretrained(folder / "model")
    tiny.model("llama", len(tokenizer)).save_pretrained(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.rows(16))
    return folder


def settings(here, output_dir, **changes):
    """The flags of a short run, by name: four updates, a checkpoint every two."""
    return {
        "model_name_or_path": str(here / "model"),
        "dataset_name": str(here / "rows.jsonl"),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }


def flags(values):
    return [token for name, value in values.items() for token in (f"--{name}", str(value))]


def train(here, output_dir, *more, **changes):
    return cli.main(["train", *flags(settings(here, output_dir, **changes)), *more])


def last_line(capsys):
    """What stderr ends with, which must be an error."""
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastdpo: error: "), line
    return line


def one_line(capsys):
    """What stderr says, which must be a single error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastdpo: error: "), lines
    return lines[0]
