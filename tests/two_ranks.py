"""Trainings for test_two_ranks.py: python two_ranks.py FOLDER RUNS, alone or under torchrun.

RUNS is a JSON object of `run`'s arguments. What a run was on rank r is FOLDER/NAME.r.pt, and
FOLDER/averaged.r.pt what `averaged` gives.
"""

import json
import os
import sys

import tiny
import torch
from accelerate import Accelerator
from trainers import TWO_BATCHES_IN_ORDER, make_trainer

from fastdpo import DPOTrainer
from fastdpo.ranks import average_gradients

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class ShortOfMemory(DPOTrainer):
    """Raises CUDA's error on rank 1: in pack fails["pack"] of batch fails["batch"], or in all.

    even: as many packs on each rank, as FSDP has them, which does not run on a CPU. logs: rank 1
    logs each batch's loss by itself.
    """

    loss_is_scaled_for_ga = True  # compute_loss hands num_items_in_batch on
    fails, even, start_with, logs = None, False, None, False
    batches = raised = packs = 0
    forwards = ()  # of each batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches, self.packs = self.batches + 1, 0
        self.packs_laid_out = len(inputs.get("packs", [inputs]))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.forwards += (self.packs,)
        if RANK == 1 and self.logs:
            self.log({"loss": loss.item()})
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.packs += 1
        if RANK == 1 and self._fails_now():
            in_backward = self.fails != "always" and self.fails["in_backward"]
            # in a backward the last gradient, in a forward the last layer: much is done by then
            embedding, last_layer = self.model.get_input_embeddings(), self.model.model.layers[-1]
            register = (
                embedding.weight.register_hook if in_backward else last_layer.register_forward_hook
            )
            self.hook = register(self._run_out)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _fails_now(self):
        if self.fails is None or self.raised:
            return False
        if self.fails == "always":
            return True
        now = (self.batches, self.packs) == (self.fails["batch"], self.fails["pack"])
        assert not now or self.packs < self.packs_laid_out, "the last pack is the easiest"
        return now

    def _run_out(self, *_):
        self.raised += self.fails != "always"
        self.hook.remove()
        raise torch.OutOfMemoryError("pretended")

    def _tokens_that_fit(self):
        return self.start_with or super()._tokens_that_fit()

    def forwards_are_collective(self):
        return self.even or super().forwards_are_collective()


def run(
    folder, *, settings, start_with=None, fails=None, even=False, evaluate_first=False, logs=False
):
    """What came of a training: its weights and log, or its error."""
    try:
        trainer = short_of_memory(folder, settings)
        trainer.fails, trainer.even, trainer.start_with = fails, even, start_with
        trainer.logs = logs
        if evaluate_first:
            trainer.evaluate(trainer.train_dataset)
        trainer.train()
    except torch.OutOfMemoryError as error:
        return {"error": str(error)}
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "weights": dict(model.state_dict()),
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry],
        "budget": trainer.budget and trainer.budget.max_tokens,
        "raised": trainer.raised,
        "forwards": trainer.forwards,
        "reference": trainer.reference.source,
    }


def short_of_memory(folder, settings):
    rows = tiny.rows(32)
    for row in rows[:4] + rows[-4:]:
        row["chosen"] *= 4  # one rank has long pairs, and more packs than the other
    return make_trainer(
        folder,
        tiny.tokenizer(),
        rows=rows,
        kind=ShortOfMemory,
        max_steps=2,
        optim="sgd",  # whose steps show the size of a gradient
        learning_rate=1e-1,
        per_device_train_batch_size=16 // WORLD_SIZE,
        layout="shared",  # not padded, as it would be for a compute_loss of its own
        **TWO_BATCHES_IN_ORDER,
        **settings,
    )


def averaged(accelerator):
    """Gradients after average_gradients, of parameters that not every rank has used."""
    values = {"both": 1.0 + RANK, "one": 4.0 if RANK else None, "none": None}
    parameters = {name: torch.nn.Parameter(torch.zeros(2, 3)) for name in values}
    for name, value in values.items():
        if value is not None:
            parameters[name].grad = torch.full((2, 3), value)
    average_gradients(parameters.values(), accelerator)
    return {name: parameter.grad for name, parameter in parameters.items()}


if __name__ == "__main__":
    folder = sys.argv[1]
    for name, arguments in json.loads(sys.argv[2]).items():
        torch.save(run(folder, **arguments), f"{folder}/{name}.{RANK}.pt")
    torch.save(averaged(Accelerator(cpu=True)), f"{folder}/averaged.{RANK}.pt")
