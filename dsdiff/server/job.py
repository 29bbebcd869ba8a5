"""A piece of work in the studio's line."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from torch import Tensor


class BusyError(Exception):
    """The line is full."""


class StoppingError(Exception):
    """The job is not done: it was stopped before it began, or the server is being stopped."""


class WalkStoppedError(Exception):
    """A walk was stopped midway. latents: those in which its last step saw it end."""

    def __init__(self, latents: Tensor):
        super().__init__("interrupted")
        self.latents = latents


class Job:
    """A piece of work in line: its result, how far it is, and whether it is to stop.

    kind: a word for it. walks: the batches it draws. step, steps: of the walk at hand, which is number `walk`, from 0.
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
        """Stop the job after the step at hand, or before it begins."""
        self.interrupted.set()

    def on_step(self, pred_x0: Tensor, i: int) -> None:
        """Note a step of a walk. Raises WalkStoppedError where the job is to stop."""
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
        """Answer a job that has not begun, in a line."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(StoppingError(line))
