"""End a training by a signal at a place from which it can go on, in all of its processes."""

import logging
import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopAfterStep(pl.Callback):
    """Let Ctrl-C, SIGTERM and SIGHUP end the training after the step at hand. A second signal ends it at once.

    An exception within a step would leave other processes waiting for its gradients for ever. Signals are noted
    instead, and the processes tell each other of them after each step.

    number: of the signal that has ended the training, in this process or another one; 0 if none has.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning has set its own answer to SIGTERM by now, which is an exchange between processes in mid-step.
        caught = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        self._before = {number: signal.signal(number, self._note) for number in caught}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self._restore()
            raise KeyboardInterrupt
        self.number = number
        logger.info("stopping after this step; once more to stop at once, without a checkpoint")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        number = self.number
        if trainer.world_size > 1:
            told = torch.tensor(number, device=pl_module.device)
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
            number = int(told)
        if number:
            self.number = number
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def end(self, text: str) -> None:
        """Do what the signal does without a training, if one came. Raises KeyboardInterrupt with `text`."""
        if not self.number:
            return
        try:
            signal.raise_signal(self.number)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(text) from interrupt
