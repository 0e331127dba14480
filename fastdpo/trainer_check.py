"""What DPOTrainer's arguments must be, said before any compute is spent."""

from datasets import Dataset, IterableDataset

from fastdpo.collate import PackedCollator
from fastdpo.config import DPOConfig


def check_arguments(
    model, ref_model, args, data_collator, train_dataset, quantization_config
) -> None:
    """ValueError or TypeError for arguments of DPOTrainer that are none, or do not go together."""
    if not isinstance(args, DPOConfig):
        raise TypeError(f"want a fastdpo.DPOConfig as args, got {type(args).__name__}")
    if not isinstance(train_dataset, Dataset | IterableDataset):
        got = "none" if train_dataset is None else type(train_dataset).__name__
        if isinstance(train_dataset, dict):  # load_dataset without split gives a DatasetDict
            got += f": take one of its splits, {[*train_dataset]}"
        raise TypeError(f"want a datasets.Dataset or IterableDataset as train_dataset, got {got}")
    if data_collator is not None:
        _check_collators_settings(args)
    if isinstance(data_collator, PackedCollator):
        raise ValueError("want layout='shared' or 'packed' in place of a PackedCollator")
    if ref_model is model:
        raise ValueError("want ref_model apart from model; leave it out for a frozen copy")
    if isinstance(model, str):
        return
    if args.model_init_kwargs is not None or quantization_config is not None:
        raise ValueError(
            "want model as a name with model_init_kwargs or quantization_config, got a "
            f"{type(model).__name__} that is already loaded"
        )


def _check_collators_settings(args: DPOConfig) -> None:
    for name, unset in {"layout": "auto", "max_tokens_per_forward": None}.items():
        if getattr(args, name) != unset:
            raise ValueError(
                f"want {name}={unset!r} with a data_collator of your own, which decides that, got "
                f"{getattr(args, name)!r}"
            )
