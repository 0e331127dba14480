"""Commands whose output nobody reads any more, as in `fastdpo train ... | head`."""

import os
import subprocess
import sys

import pytest

from fastdpo import cli

PRINT = "cli.train = cli._verify = lambda *_, **__: print('a line', file=sys.{}) or 0\n"
WITHIN_BAD_INPUT = (
    "def train(*_, **__):\n"
    "    with cli._bad_input(): print('help', flush=True)\n"
    "cli.train = train\n"
)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command, setup",
    [
        ("--help", ""),
        ("train", PRINT.format("stdout")),
        ("verify", PRINT.format("stdout")),
        ("train", PRINT.format("stderr")),
        ("train", WITHIN_BAD_INPUT),
    ],
)
def test_a_reader_that_has_gone_ends_a_command_without_a_word(command, setup, unbuffered):
    code = f"import sys; from fastdpo import cli\n{setup}sys.exit(cli.main(['{command}']))"
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writer,
        stderr=writer if "stderr" in setup else subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (process.returncode, process.stderr or b"") == (141, b"")


def test_a_pipe_of_another_kind_that_breaks_is_an_error(monkeypatch, capfd):
    def train(*_, **__):
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr(cli, "train", train)
    with pytest.raises(BrokenPipeError, match="a worker has gone"):
        cli.main(["train"])
