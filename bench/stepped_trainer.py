"""A transformers.Trainer that trains one optimizer step at a time, when it is told to.

Contenders can then take turns step by step, and a step is all that a user pays for one: from
`on_step_begin` to the next `on_step_begin`, so the batch, the log and the callbacks are in it,
and the trainer's construction and start are not.
"""

import queue
from concurrent.futures import Future, ThreadPoolExecutor

from transformers import PrinterCallback, Trainer, TrainerCallback


class _Closed(Exception):
    """Ends the training loop from within."""


class SteppedTrainer(TrainerCallback):
    """`trainer.train()` in a thread that stands still at the beginning of every step.

    The first step is about to begin when the constructor returns. `log` holds what the trainer
    logged. An error in the training loop is raised by the call that met it.
    """

    def __init__(self, trainer: Trainer):
        self.log: list[dict[str, float]] = []
        self._may_go: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._stands: queue.SimpleQueue[Future | None] = queue.SimpleQueue()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        self._executor = ThreadPoolExecutor(1)
        self._training = self._executor.submit(trainer.train)
        self._training.add_done_callback(self._stands.put)
        self._wait()

    def step(self) -> None:
        self._may_go.put(True)
        self._wait()

    def close(self) -> None:
        self._may_go.put(False)
        self._executor.shutdown()

    def _wait(self) -> None:
        ended = self._stands.get()
        if ended is not None:
            self._executor.shutdown()
            ended.result()
            raise ValueError("want max_steps above the steps taken, got to the end of the training")

    def on_step_begin(self, args, state, control, **kwargs):
        self._stands.put(None)
        if not self._may_go.get():
            raise _Closed

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.log.append(dict(logs))
