"""A piece of work in the studio's queue."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from torch import Tensor


class BusyError(Exception):
    """The queue is full."""


class StoppingError(Exception):
    """The job is not done: it was stopped before it began, or the server is being stopped."""


class WalkStoppedError(Exception):
    """The sampling of a batch was stopped midway. latents: the x_0 [B, C, h, w] that its last step predicted."""

    def __init__(self, latents: Tensor):
        super().__init__("interrupted")
        self.latents = latents


class Job:
    """A piece of work in the queue: its result, its progress, and whether it is to stop.

    kind: a word for it. walks: how many batches it draws; walk: the number of the current one, from 0. step, steps: how
    many steps of it are done, and how many there are.
    """

    def __init__(self, kind: str, work: "Callable[[Job], Any]", walks: int = 1):
        self.kind, self.walks = kind, walks
        self.future: Future[Any] = Future()
        self.started: float | None = None
        self.walk = self.step = self.steps = 0
        self.latents: np.ndarray | None = None  # [C, h, w], of the first picture of the walk at hand
        self.interrupted = threading.Event()
        self._work = work

    @property
    def progress(self) -> float:
        """The share of the steps that is done, in [0, 1]."""
        return min(1.0, (self.walk + self.step / self.steps) / self.walks) if self.steps else 0.0

    @property
    def seconds_left(self) -> float:
        """The seconds to go at the pace so far; 0 where it is not known."""
        done = self.progress
        return 0.0 if self.started is None or not done else (time.time() - self.started) * (1 - done) / done

    def interrupt(self) -> None:
        """Stop the job after the current step, or before it begins."""
        self.interrupted.set()

    def on_step(self, pred_x0: Tensor, i: int) -> None:
        """Note that step i of a batch is done, and its predicted x_0. Raises WalkStoppedError if the job is to stop."""
        self.step, self.latents = i + 1, pred_x0[0].float().cpu().numpy().copy()
        if self.interrupted.is_set():
            raise WalkStoppedError(pred_x0)

    def run(self) -> None:
        """Do the work, and give its result or its error to the future; nothing if nobody waits for it any more."""
        if self.interrupted.is_set():
            self.refuse("stopped while it waited")
        elif self.future.set_running_or_notify_cancel():
            self.started = time.time()
            try:
                self.future.set_result(self._work(self))
            except BaseException as error:
                self.future.set_exception(error)

    def refuse(self, line: str) -> None:
        """End a job that has not begun with a StoppingError of one line."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(StoppingError(line))
