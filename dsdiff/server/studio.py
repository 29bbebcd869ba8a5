"""The studio: one thread that keeps one model and draws one request after the other; others wait in a queue.

All of torch's work is done in this thread. Where another one lets torch compute in parallel, OpenMP makes it a pool of
threads of its own, and since there are then more threads than cores, no pool waits actively any more: drawing takes
twice as long from then on. Previews and scores are for NumPy.
"""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dsdiff.draw_settings import DrawSettings
from dsdiff.images.init import InitPicture, init_picture, pasted
from dsdiff.images.png import to_pictures, write_png
from dsdiff.jobs import next_number
from dsdiff.options import LoraOptions
from dsdiff.pipeline import Pipeline
from dsdiff.server.job import BusyError, Job, StoppingError, WalkStoppedError
from dsdiff.server.memory import peak_within
from dsdiff.server.options import Limits
from dsdiff.server.previews import LatentColors
from dsdiff.server.records import texts_of
from dsdiff.server.requests import Drawing, Drawn, DrawRequest
from dsdiff.server.shelf import Shelf
from ldm.half_storage import give_back_freed

logger = logging.getLogger(__name__)

STOPPING = "the server is being stopped"


class Studio:
    """Keeps a model, and draws.

    shelf: the models. limits: of requests. outdir: a folder for every picture drawn; None for none.
    """

    def __init__(self, shelf: Shelf, limits: Limits, outdir: Path | None = None):
        self.shelf, self.limits, self.outdir = shelf, limits, outdir
        self.title = shelf.first.title  # of the model that is kept, or will be
        self.colors: LatentColors | None = None
        self.job: Job | None = None  # at hand
        self._pipeline: Pipeline | None = None
        self._loras: tuple[LoraOptions, ...] = ()  # of the request that was drawn last
        self._line: deque[Job] = deque()
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="studio", daemon=True)
        self._thread.start()

    # --- the queue ----------------------------------------------------------------------------------------

    def draw(self, request: DrawRequest, kind: str = "txt2img") -> Job:
        """Put a request into the queue; its result is a Drawing. Raises ValueError beyond the limits, and BusyError."""
        request.check(self.limits)
        self.shelf.find(request.model)
        walks = -(-request.pictures // request.batch_size)
        return self.submit(Job(kind, lambda job: self._draw(request, job), walks))

    def switch(self, title: str) -> Job:
        """Queue the change to another model. Raises ValueError for a title that no model has, and BusyError."""
        self.shelf.find(title)
        return self.submit(Job("model", lambda job: self._switch(title)))

    def submit(self, job: Job) -> Job:
        """Put a job into the queue. Raises BusyError if the queue is full, and StoppingError as the server stops."""
        with self._change:
            if self._stopping:
                raise StoppingError(STOPPING)
            if len(self._line) >= self.limits.queue + (self.job is None):
                raise BusyError(f"{len(self._line)} requests wait already: try again later")
            self._line.append(job)
            self._change.notify()
        return job

    def waiting(self) -> int:
        """Return how many jobs wait, the one at hand left out."""
        return len(self._line)

    @property
    def is_stopping(self) -> bool:
        """True once it draws no more."""
        return self._stopping

    def interrupt(self) -> None:
        """Stop the job at hand after its step; its picture is given as far as it is."""
        job = self.job
        if job is not None:
            job.interrupt()

    def stop(self) -> None:
        """Stop the job at hand after its step, and refuse all others. The model is left to `close`."""
        with self._change:
            self._stopping = True
            self._change.notify()
        self.interrupt()

    def close(self) -> None:
        """Stop, and wait for the step at hand to end."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._line or self._stopping)
                if self._stopping:
                    for job in self._line:
                        job.refuse(STOPPING)
                    self._line.clear()
                    return
                self.job = self._line.popleft()
            self.job.run()
            self.job = None  # the last reference to what it drew, or to the model of an error

    # --- work, in the thread ------------------------------------------------------------------------------

    def _switch(self, title: str) -> Pipeline:
        entry = self.shelf.find(title)
        if self._pipeline is not None and self.title == entry.title:
            return self._pipeline
        pipeline = self.shelf.open(entry)  # errors of its files leave the model at hand as it is
        self._pipeline, self.colors, self._loras = None, None, ()  # two models at once may not fit
        gc.collect()
        give_back_freed()
        for line in (pipeline, *pipeline.notes):
            logger.info("%s", line)
        colors = LatentColors.of(pipeline)  # reads the model
        self._pipeline, self.colors, self.title = pipeline, colors, entry.title
        return pipeline

    def _draw(self, request: DrawRequest, job: Job) -> Drawing:
        pipeline = self._switch(request.model)
        if request.loras != self._loras:
            own = self.shelf.choice.loras if self.shelf.find(request.model).own else ()
            pipeline.set_lora(*own, *request.loras)
            self._loras = request.loras
        settings = pipeline.resolve(request.options)
        request.check_settings(settings, self.limits)
        pipeline.prepare(settings)
        start = time.perf_counter()
        with peak_within(pipeline.device) as peak:
            images, whole = self._walks(pipeline, request, settings, job)
        seconds = time.perf_counter() - start
        pictures = [
            Drawn(
                image=image,
                seed=request.seed + i,
                texts=texts_of(pipeline, request, settings, request.seed + i),
                whole=i < whole,
            )
            for i, image in enumerate(images)
        ]
        self._keep(pictures)
        interrupted = job.interrupted.is_set()
        return Drawing(
            request=request,
            settings=settings,
            pictures=pictures,
            seconds=seconds,
            memory=peak.bytes,
            interrupted=interrupted,
        )

    def _walks(
        self, pipeline: Pipeline, request: DrawRequest, settings: DrawSettings, job: Job
    ) -> tuple[list[Any], int]:
        """Return the pictures, and how many of them are whole. An interrupted job's last ones are not."""
        init = None
        if settings.init is not None and request.init is not None:
            init = init_picture(request.init, request.mask, (settings.width, settings.height), settings.init)
        images: list[Any] = []
        seeds = range(request.seed, request.seed + request.pictures)
        for job.walk, first in enumerate(range(0, request.pictures, request.batch_size)):
            job.step, job.steps = 0, settings.steps_taken
            if job.interrupted.is_set():
                return images, len(images)
            part = seeds[first : first + request.batch_size]
            try:
                latents = self._sample(pipeline, request, part, settings, init, job)
            except WalkStoppedError as stopped:
                if self._stopping:
                    raise StoppingError(STOPPING) from None
                return [*images, *_decoded(pipeline, stopped.latents, settings, init)], len(images)
            images += _decoded(pipeline, latents, settings, init)
        return images, len(images)

    def _sample(
        self,
        pipeline: Pipeline,
        request: DrawRequest,
        seeds: Sequence[int],
        settings: DrawSettings,
        init: InitPicture | None,
        job: Job,
    ) -> Tensor:
        start = None if init is None else pipeline.start_from([init] * len(seeds), settings)
        prompts = [request.prompt] * len(seeds)
        return pipeline.sample(prompts, seeds, settings, init=start, img_callback=job.on_step)

    def _keep(self, pictures: Sequence[Drawn]) -> None:
        if self.outdir is None:
            return
        first = next_number(self.outdir, "")
        for number, picture in enumerate((p for p in pictures if p.whole), first):
            write_png(self.outdir / f"{number:05}.png", picture.image, picture.texts)


def _decoded(pipeline: Pipeline, latents: Tensor, settings: DrawSettings, init: InitPicture | None) -> list[Any]:
    images = to_pictures(pipeline.decode(latents, settings))
    if init is None or settings.init is None:
        return images
    return [pasted(image, init, settings.init) for image in images]
