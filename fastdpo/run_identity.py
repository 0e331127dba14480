"""A run's identity: the settings that decide its numbers, and what its data and model hold."""

import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastdpo.arguments import RunArguments

# Settings that cannot change what is trained. Any other one counts, a later transformers' too.
NOT_IDENTITY = frozenset(
    # where it goes, how it is told
    "output_dir logging_strategy logging_steps logging_first_step log_on_each_node log_level "
    "log_level_replica logging_nan_inf_filter include_num_input_tokens_seen disable_tqdm report_to "
    "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id debug "
    "skip_memory_metrics do_train do_eval do_predict local_rank "
    # saving, resuming, the Hub
    "save_strategy save_steps save_total_limit save_only_model save_on_each_node "
    "enable_jit_checkpoint resume_from_checkpoint restore_callback_states_from_checkpoint "
    "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
    # evaluation
    "dataset_test_split eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps "
    "eval_do_concat_batches eval_use_gather_object batch_eval_metrics per_device_eval_batch_size "
    "bf16_full_eval fp16_full_eval prediction_loss_only include_for_metrics "
    # who reads and tokenises, and how patiently
    "dataset_num_proc dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_multiprocessing_context ddp_timeout "
    # how much memory and time it takes: a run that had too little goes on with less. Packs,
    # layouts, compilation, Liger's kernels and attention's implementation only change the order in
    # which sums are rounded; the reference is the same whenever it is scored.
    "torch_empty_cache_steps head_cache_bytes max_tokens_per_forward gradient_checkpointing "
    "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs "
    "layout strict_layout padding_free precompute_ref_log_probs precompute_ref_batch_size "
    "attn_implementation use_liger_kernel liger_kernel_config pad_to_multiple_of "
    "ddp_find_unused_parameters ddp_bucket_cap_mb "
    "torch_compile torch_compile_backend torch_compile_mode".split()
)
# but where rows are streamed, whose order depends on them
OF_STREAMS = frozenset({"dataloader_num_workers"})


def run_identity(run: RunArguments) -> dict[str, Any]:
    """Every setting that decides the numbers of a run, as flat JSON values by name.

    A local path is replaced by its last component and a hash: of all bytes of data, except caches
    that `datasets` writes beside it and the run's own output, and of a sample of a model's weights.
    """
    settings = {
        **asdict(run.script),
        **asdict(run.model),
        **asdict(run.mixture),
        **run.training.to_dict(),
        "pad_token": run.training.pad_token,  # to_dict hides what ends in _token
        "num_processes": run.training.world_size,
    }
    is_streamed = run.script.dataset_streaming or run.mixture.streaming
    left_out = NOT_IDENTITY - OF_STREAMS if is_streamed else NOT_IDENTITY
    settings = {name: value for name, value in settings.items() if name not in left_out}
    settings["model_name_or_path"] = _with_hash(settings["model_name_or_path"], _model_hash)
    data_hash = partial(_data_hash, but=Path(run.training.output_dir))
    settings["dataset_name"] = _with_hash(settings["dataset_name"], data_hash)
    for dataset in settings["datasets"]:
        for name in ("path", "data_dir", "data_files"):
            dataset[name] = _with_hash(dataset[name], data_hash)
    return json.loads(json.dumps(dict(_flat(settings)), default=str))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """`value`'s leaves by dotted name: a difference can then be named and read."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield from _flat({str(i): item for i, item in enumerate(value)}, name)
    else:
        yield name, value


def _with_hash(name: Any, hash_of: Callable[[list[Path]], str]) -> Any:
    """`name`, or "<last part> (<hash>)" where it is a file, folder or pattern of this machine."""
    if isinstance(name, dict):
        return {key: _with_hash(each, hash_of) for key, each in name.items()}
    if isinstance(name, list):
        return [_with_hash(each, hash_of) for each in name]
    if not name:
        return name
    path = Path(name).expanduser()
    found = [path] if path.exists() else [*map(Path, sorted(glob.glob(str(path), recursive=True)))]
    return f"{path.absolute().name} ({hash_of(found)})" if found else name


def _data_hash(paths: list[Path], *, but: Path) -> str:
    """A hash of these files, and of all files in these folders except in the folder `but`."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        is_within = path.resolve() in but.resolve().parents
        for file in files:
            if _is_cached(file) or (is_within and file.resolve().is_relative_to(but.resolve())):
                continue
            digest.update(file.relative_to(path).as_posix().encode())
            with open(file, "rb") as opened:
                while piece := opened.read(2**20):
                    digest.update(piece)
    return digest.hexdigest()[:16]


def _is_cached(file: Path) -> bool:
    """Whether `datasets` made the file of a saved dataset beside it, or is about to."""
    is_temporary = file.name.startswith("tmp") and not file.suffix
    return is_temporary or (file.name.startswith("cache-") and file.suffix == ".arrow")


def _model_hash(paths: list[Path]) -> str:
    """A hash of a model's configuration, tokenizer and weights; of a large file, its two ends."""
    kinds = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}
    files = [path for path in paths if path.is_file()]
    for folder in (path for path in paths if path.is_dir()):
        files += sorted(path for path in folder.iterdir() if path.suffix in kinds)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(size - 2**20, 0))
            digest.update(opened.read())
    return digest.hexdigest()[:16]
