"""What an update finds when it begins, to run it again from there when memory runs out."""

import copy
from collections.abc import Sequence

import torch
from transformers import Trainer


class UpdateStart:
    """A trainer's named attributes, random states and gradients, as they are now."""

    def __init__(self, trainer: Trainer, names: Sequence[str]):
        self._trainer = trainer
        self._attributes = copy.deepcopy({name: getattr(trainer, name) for name in names})
        self._random_states = [
            (generator, generator.get_state()) for generator in _generators(trainer.args.device)
        ]
        self._gradients = {  # what a stream left over at its end; mostly there are none
            parameter: parameter.grad.clone()
            for parameter in trainer.model.parameters()
            if parameter.grad is not None
        }

    def restore(self) -> None:
        """Undo what the update did; may be called again."""
        for name, value in copy.deepcopy(self._attributes).items():
            setattr(self._trainer, name, value)
        for generator, state in self._random_states:
            generator.set_state(state)
        self._trainer.model.zero_grad()
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient.clone()
        if self._trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()


def _generators(device: torch.device) -> list[torch.Generator]:
    """What dropout draws from."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return generators
