"""`fastdpo train | verify | demo`: parse, call, print.

`fastdpo train` takes the flags and YAML files of `trl dpo`; `fastdpo dpo` is the same. Bad input
ends with one line on stderr and exit code 2, Ctrl-C with 130. Whatever goes wrong while flags, rows
and model are read counts as bad input; FASTDPO_DEBUG=1 shows its traceback as well. Later errors
propagate with their traceback. Where the reader of the output has gone (`fastdpo train ... | head`)
a command ends without a word, with 141 as in a shell; a run resumes, as after Ctrl-C.
"""

import contextlib
import gc
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastdpo
from fastdpo.launch import is_launched, launch, launch_flags
from fastdpo.run_file import set_environment

if TYPE_CHECKING:
    from fastdpo.arguments import RunArguments
    from fastdpo.run_folder import RunFolder
    from fastdpo.trainer import DPOTrainer

# Nothing above imports torch, so that --help and --version answer at once: a command imports
# what it runs.

USAGE = """\
usage: fastdpo [--version] [--help] COMMAND ...

  train   fine-tune a model on preference pairs (also: dpo)
            fastdpo train --model_name_or_path MODEL --dataset_name ROWS --output_dir FOLDER
            fastdpo train --config run.yaml
          Flags and YAML files are those of `trl dpo`. Run again, it resumes.
  verify  compare the engine with plain PyTorch on the first rows of a run, with its flags
            fastdpo verify --model_name_or_path MODEL --dataset_name ROWS [--max_pairs 8]
          Exit code 0: they agree; 1: they differ, and it says where; 2: bad input;
          3: another error.
  demo    train a small model built on the spot (no download): what it learned, how fast

`fastdpo COMMAND --help` lists a command's flags."""

READER_GONE = 141  # the exit code: 128 + SIGPIPE


class BadInput(Exception):
    """What the caller got wrong, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run_command(argv)
        sys.stdout.flush()  # a reader that has gone is noticed here, or at Python's end
        return code
    except BrokenPipeError:
        if _reader_has_gone():
            return READER_GONE
        raise
    except BadInput as error:
        if os.environ.get("FASTDPO_DEBUG") == "1":
            traceback.print_exception(error)
        print(f"fastdpo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdpo: interrupted", file=sys.stderr)
        return 130


def _reader_has_gone() -> bool:
    """Whether nobody reads stdout or stderr any more; what is still to come then goes nowhere."""
    has_gone = False
    for stream in (sys.stdout, sys.stderr):
        pipe = select.poll()
        pipe.register(stream, 0)
        if pipe.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python's end fails too
            has_gone = True
    return has_gone


def _run_command(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("train", "dpo", "verify"):
        set_environment(rest)
    if command in ("train", "dpo"):
        return train(rest, prog=f"fastdpo {command}")
    if command == "verify":
        return verify(rest)
    if command == "demo":
        from fastdpo import demo

        with _bad_input():
            arguments = demo.parse(rest)
        return demo.run(arguments)
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"fastdpo {fastdpo.__version__}")
    else:
        raise BadInput(f"want a command, train, verify or demo, got {command!r} (fastdpo --help)")
    return 0


def train(argv: Sequence[str], *, prog: str = "fastdpo train") -> int:
    """Train as `argv` says, from the last checkpoint if its output_dir holds one of this run."""
    from accelerate import PartialState

    from fastdpo.parser import TrainParser
    from fastdpo.ranks import from_main_process
    from fastdpo.run_folder import locked, mark_finished, mark_started

    with _bad_input():
        run, fresh, unknown = TrainParser(prog=prog).parse(argv)
        flags = launch_flags(unknown)
        _check_flags(run)
        if not is_launched() and (flags or run.training.n_gpu > 1):
            return launch(flags, argv)
    folder, identity = from_main_process(lambda: _choose_folder(run, fresh), run.training)

    is_main = run.training.process_index == 0
    say = print if is_main else lambda text: None
    for note in folder.notes:
        say(note)
    if folder.finished:
        PartialState().destroy_process_group()  # gloo's threads, left alone, at times abort
        return 0

    is_made = folder.path != Path(run.training.output_dir) or not folder.path.exists()
    run.training.output_dir = str(folder.path)
    with contextlib.ExitStack() as stack:
        with _bad_input():
            if is_main:
                stack.enter_context(locked(folder.path))
            if is_made:  # removed again if the run never starts
                stack.callback(_remove_if_empty, folder.path)
            trainer = _build_trainer(run)
        say(trainer.summary())
        if is_main:
            with _bad_input():
                mark_started(folder.path, identity)
        _train(trainer, folder.checkpoint)
        _save(trainer, folder.path, run.script.dataset_name, say)
        if is_main:
            mark_finished(folder.path)
    if hasattr(trainer, "end"):  # from transformers 5.18
        _let_go_of_wrapper(trainer)
        trainer.end()
    return 0


def _let_go_of_wrapper(trainer: "DPOTrainer") -> None:
    """Drop DDP's wrapper before its process group: with gloo, outliving it, it hung at times."""
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _train(trainer: "DPOTrainer", checkpoint: Path | None) -> None:
    from fastdpo.row_errors import RowError

    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except RowError as error:  # the rows of a stream are read only now, perhaps by a worker
        detail = str(error).rpartition(f"{RowError.__name__}: ")[2]  # behind its traceback
        raise BadInput(_one_line(detail)) from error


def verify(argv: Sequence[str]) -> int:
    """Compare the engine with plain PyTorch as `argv` says: 0 where they agree, 1 where not.

    3 for an error that is not bad input. 1 is kept for a difference.
    """
    try:
        return _verify(argv)
    except BadInput:
        raise
    except Exception as error:  # Python's own exit code for one is 1
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return READER_GONE
        traceback.print_exc()
        return 3


def _verify(argv: Sequence[str]) -> int:
    from fastdpo.parser import VerifyParser
    from fastdpo.plain_way import plain_way
    from fastdpo.subject import load_subject
    from fastdpo.verify import HEADER, compare, describe

    with _bad_input():
        run, max_pairs, unknown = VerifyParser(prog="fastdpo verify").parse(argv)
        if flags := launch_flags(unknown):
            raise ValueError(f"want flags of one process, got {flags[0]}")
        _check_flags(run)
        subject = load_subject(run, max_pairs)
        plain = plain_way(subject)
    print(describe(subject, plain), HEADER, sep="\n", flush=True)
    agrees = True
    for finding in compare(subject, plain):
        print(finding, flush=True)
        agrees &= finding.agrees
    return 0 if agrees else 1


def _check_flags(run: "RunArguments") -> None:
    """ValueError for flags that are missing, or that would have no effect."""
    script_args, training_args, model_args, mixture_args = run
    if not model_args.model_name_or_path:
        raise ValueError("want --model_name_or_path, got none")
    if not training_args.output_dir:
        raise ValueError("want --output_dir, got an empty name")
    if not (script_args.dataset_name or mixture_args.datasets):
        raise ValueError("want --dataset_name, or datasets in a YAML file, got neither")
    if script_args.dataset_name is not None and mixture_args.datasets:
        raise ValueError("want --dataset_name, or datasets in a YAML file, got both")
    if mixture_args.datasets:
        names = [name for name in vars(script_args) if name.startswith("dataset_")]
        _want_defaults(script_args, names, "with datasets, which say it themselves")
    else:
        names = ("test_split_size", "streaming")
        _want_defaults(mixture_args, names, "with dataset_name, without datasets")
    if not model_args.use_peft:
        lora = ("lora_", "use_rslora", "use_dora")
        names = [name for name in vars(model_args) if name.startswith(lora)]
        _want_defaults(model_args, names, "without use_peft")
    if training_args.eval_on_start and training_args.eval_strategy == "no":
        raise ValueError("want an eval_strategy with eval_on_start, got no")


def _want_defaults(arguments: Any, names: Iterable[str], when: str) -> None:
    for name in names:
        value, default = getattr(arguments, name), getattr(type(arguments)(), name)
        if value != default:
            raise ValueError(f"want {name}={default} {when}, got {value!r}")


def _choose_folder(run: "RunArguments", fresh: bool) -> tuple["RunFolder", dict[str, Any]]:
    """The run's folder and identity, for which all of the data is read."""
    from fastdpo.run_folder import choose_run_folder
    from fastdpo.run_identity import run_identity

    with _bad_input():
        identity = run_identity(run)
        folder = choose_run_folder(
            run.training.output_dir,
            identity,
            fresh=fresh,
            resume_from=run.training.resume_from_checkpoint,
        )
    return folder, identity


def _build_trainer(run: "RunArguments") -> "DPOTrainer":
    import torch

    from fastdpo.arguments import check_layers_named, init_kwargs, peft_config, quantization_config
    from fastdpo.mixture import load_datasets
    from fastdpo.trainer import DPOTrainer
    from fastdpo.trainer_check import check_optimizer_and_schedule

    script_args, training_args, model_args, mixture_args = run
    check_optimizer_and_schedule(training_args)
    train_rows, eval_rows = load_datasets(
        script_args,
        mixture_args,
        with_eval=training_args.eval_strategy != "no",
        on_bad_rows=training_args.on_bad_rows,
        seed=training_args.seed,
    )
    training_args.model_init_kwargs = init_kwargs(training_args, model_args)
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        quantization_config=quantization_config(model_args),
        peft_config=peft_config(model_args),
    )
    check_layers_named(trainer.model, model_args)
    if script_args.ignore_bias_buffers:
        # DistributedDataParallel reads this name; some backends cannot broadcast booleans
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def _save(
    trainer: "DPOTrainer", path: Path, dataset_name: str | None, say: Callable[[str], Any]
) -> None:
    trainer.save_model(str(path))
    what = "adapters" if (path / "adapter_config.json").exists() else "model"
    say(f"saved {what} and tokenizer to {path}")
    if trainer.args.push_to_hub:
        is_local = dataset_name is None or Path(dataset_name).exists()
        trainer.push_to_hub(dataset_name=None if is_local else dataset_name)
        say(f"pushed to https://huggingface.co/{trainer.hub_model_id}")


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """What is wrong with the flags, files, model or rows becomes one line.

    ImportError is among it: a flag asked for a package that is not installed. An error of another
    kind, from deep inside a library, is reported with its kind; too little memory stays what it is.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, BrokenPipeError):  # nor is a reader that has gone
        raise
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(_one_line(error)) from error
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            # `datasets` waits for its workers once more, and reports that they have not ended
            raise error.__context__ from None
        detail = f"{type(error).__name__}: {_one_line(error)} (FASTDPO_DEBUG=1 shows where)"
        raise BadInput(detail) from error


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
