"""What a subclass of DPOTrainer, or a script, has put in the place of its methods."""

from typing import Any

from transformers import Trainer

from fastdpo.config import DPOConfig

NEVER_CALLED = (  # methods of TRL's DPOTrainer, now and before
    "_prepare_dataset _compute_loss _precompute_ref_logps compute_ref_log_probs "
    "get_batch_loss_metrics concatenated_forward".split()
)


def check_overrides(name: str, own: set[str], args: DPOConfig) -> None:
    """TypeError where a trainer has a method of TRL's of its own that fastdpo never calls.

    ValueError for packs with a compute_loss that returns means, as a pack is not a batch. A class
    whose compute_loss divides by num_items_in_batch says so by loss_is_scaled_for_ga=True.

    name: of its class. own: own_names of it.
    """
    unused = [method for method in NEVER_CALLED if method in own]
    if unused:
        raise TypeError(f"want {name} to override what fastdpo calls, got {unused}")
    if args.max_tokens_per_forward and returns_means(own):
        raise ValueError(
            "want max_tokens_per_forward unset with a compute_loss of your own, or in its class "
            "loss_is_scaled_for_ga=True if it divides by num_items_in_batch, got "
            f"{args.max_tokens_per_forward!r}"
        )


def returns_means(own: set[str]) -> bool:
    """Whether a compute_loss is among `own`, which returns a batch's mean as TRL's does."""
    return "compute_loss" in own and "loss_is_scaled_for_ga" not in own


def own_names(trainer: Trainer, base: type, defined: dict[str, Any]) -> set[str]:
    """Attributes that the class of `trainer` has of its own, and not from `base`.

    Those of `base` that are not as `defined` are a script's, which has put them in their place; so
    is a loss put into the trainer itself.
    """
    mro = type(trainer).__mro__
    replaced = [name for name, value in vars(base).items() if value is not defined.get(name)]
    own = set(replaced).union(*map(vars, mro[: mro.index(base)]))
    of_loss = {"compute_loss", "prediction_step", "loss_is_scaled_for_ga"}
    return own | (vars(trainer).keys() & of_loss)
