"""TRLNames: what scripts written for TRL's trainer read, set and call on it, by its names."""

import copy

from torch import nn
from transformers import Trainer

from fastdpo.config import DPOConfig


def _of_args(name: str) -> property:
    return property(
        lambda self: getattr(self.args, name),
        lambda self, value: setattr(self._own_args(), name, value),
        doc=f"args.{name}",
    )


class TRLNames(Trainer):
    """A loss setting reads and sets what `args` holds; callbacks change it between steps.

    From the first change on, `args` is a copy: the caller's may be another trainer's, too.

    router_aux_loss_coef: weight of the experts' load-balancing loss, set by the trainer.
    _tag_names: those of the model and its card.
    """

    args: DPOConfig
    router_aux_loss_coef: float
    _args_are_own = False
    _tag_names = ["fastdpo", "dpo"]

    beta = _of_args("beta")
    label_smoothing = _of_args("label_smoothing")
    ld_alpha = _of_args("ld_alpha")
    f_divergence_type = _of_args("f_divergence_type")
    f_alpha_divergence_coef = _of_args("f_alpha_divergence_coef")
    use_weighting = _of_args("use_weighting")

    def _own_args(self) -> DPOConfig:
        if not self._args_are_own:
            self.args, self._args_are_own = copy.copy(self.args), True
            self.args.loss_weights = self.args.loss_weights and [*self.args.loss_weights]
        return self.args

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the experts' load-balancing loss is part of the loss."""
        return self.router_aux_loss_coef > 0

    @property
    def loss_types(self) -> list[str]:
        """args.loss_type. Setting it drops weights that are all 1; others must be set to match."""
        return self.args.loss_type

    @loss_types.setter
    def loss_types(self, names: list[str]) -> None:
        args = self._own_args()
        if args.loss_weights == [1.0] * len(args.loss_type):
            args.loss_weights = None
        args.loss_type = names

    @property
    def loss_weights(self) -> list[float]:
        """args.loss_weights; the first read writes 1s where none were given, so that a callback may
        change one in place."""
        args = self._own_args()
        if args.loss_weights is None:
            args.loss_weights = [1.0] * len(args.loss_type)
        return args.loss_weights

    @loss_weights.setter
    def loss_weights(self, weights: list[float] | None) -> None:
        self._own_args().loss_weights = weights

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model; None where it is the policy without its adapters, or the rows'."""
        return self.models().get("ref_model")

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **kwargs):
        """As transformers.Trainer's, which calls `dataset` what TRL's scripts call dataset_name."""
        if dataset_name is not None:
            kwargs |= {"dataset": dataset_name, "dataset_tags": dataset_name}
        tags = [tags] if isinstance(tags, str) else tags or []
        tags = [*dict.fromkeys([*tags, *self._tag_names])]  # push_to_hub's have them already
        super().create_model_card(model_name=model_name, tags=tags, **kwargs)
