"""LossAttributes: a trainer's loss settings by the names that TRL's trainer has for them."""

import copy

from fastdpo.config import DPOConfig


def _of_args(name: str) -> property:
    return property(
        lambda self: getattr(self.args, name),
        lambda self, value: setattr(self._own_args(), name, value),
        doc=f"args.{name}",
    )


class LossAttributes:
    """Each reads and sets what `args` holds; callbacks change them between steps.

    From the first change on, `args` is a copy: the caller's may be another trainer's, too.

    router_aux_loss_coef: weight of the experts' load-balancing loss, set by the trainer.
    """

    args: DPOConfig
    router_aux_loss_coef: float
    _args_are_own = False

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
