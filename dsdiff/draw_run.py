"""A run of scripts/txt2img.py or img2img.py: batches of jobs drawn into a folder, with grids, and the time kept."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dsdiff.images.grids import Grids
from dsdiff.images.init import InitPicture, init_picture, pasted, read_mask, read_picture
from dsdiff.images.png import read_whole_picture, to_pictures, write_png
from dsdiff.jobs import Job
from dsdiff.pipeline import Pipeline
from dsdiff.record import RunRecord
from qdiff.distributed import barrier, own_share, rank, restarted, world_size

Batch = Sequence[Job]


class DrawRun:
    """Draws batches and keeps the time. It counts what it drew, not what an earlier run had left.

    keep: pictures that are there already, whole and of the right size, are kept as they are. save: write single
    pictures at all.
    """

    def __init__(self, pipeline: Pipeline, record: RunRecord, *, keep: bool, save: bool):
        self.pipeline, self.record, self.keep, self.save = pipeline, record, keep, save
        self.pictures = self.steps = 0
        self.seconds = self.sampling_seconds = 0.0

    def is_done(self, batch: Batch) -> bool:
        """Return True if nothing of a batch is left to draw."""
        return self.keep and all(self._read(job) is not None for job in batch)

    def execute(self, outdir: Path, batches: Sequence[Batch], pending: Sequence[bool]) -> None:
        """Draw the pending batches, and write the grids of all. A KeyboardInterrupt tells how to go on.

        Several processes share the batches by their numbers. The first makes the grids, from files, when all are drawn.
        """
        try:
            if world_size() > 1:
                own = [batch for batch, to_draw in own_share(list(zip(batches, pending, strict=True))) if to_draw]
                for _ in self._pictures(own, [True] * len(own)):
                    pass
                barrier()
                pending = [False] * len(batches)
            if rank() == 0:
                self._write_grids(outdir, batches, pending)
        except KeyboardInterrupt:
            way_on = f" in {outdir}; the same command with --resume draws the rest" if self.save else ""
            raise KeyboardInterrupt(f"{self.pictures} pictures drawn{way_on}") from None

    def _write_grids(self, outdir: Path, batches: Sequence[Batch], pending: Sequence[bool]) -> None:
        """Draw what is pending still, and write the grids of all batches."""
        record = self.record
        grids = None if record.skip_grid else Grids(outdir, record.first_grid, record.n_rows)
        for pictures in self._pictures(batches, pending):
            if grids is not None:
                grids.add(pictures)
        if grids is not None:
            grids.flush()

    def _pictures(self, batches: Sequence[Batch], pending: Sequence[bool]) -> Iterator[list[Image.Image]]:
        """Yield the pictures of each batch: drawn and saved if it is pending, else read if grids want them."""
        # A `with` block, so that an interrupt ends the bar's line, too.
        with tqdm(batches, "batches", unit="batch", disable=rank() != 0) as bar:
            for batch, to_draw in zip(bar, pending, strict=True):
                if to_draw:
                    pictures = self._draw(batch)
                    self._write(batch, pictures)
                    yield pictures
                else:
                    read = [] if self.record.skip_grid else [self._read(job) for job in batch]
                    yield [picture for picture in read if picture is not None]

    def _draw(self, batch: Batch) -> list[Image.Image]:
        start = time.perf_counter()
        prompts, seeds, draw = [job.prompt for job in batch], [job.seed for job in batch], batch[0].draw
        inits = [self._init(job) for job in batch] if draw.init is not None else []
        init = self.pipeline.start_from(inits, draw) if inits else None
        latents = self.pipeline.sample(prompts, seeds, draw, init=init, verbose=rank() == 0, callback=self._count_step)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        self.sampling_seconds += time.perf_counter() - start
        pictures = to_pictures(self.pipeline.decode(latents, draw))
        if draw.init is not None:
            pictures = [pasted(*pair, draw.init) for pair in zip(pictures, inits, strict=True)]
        self.seconds += time.perf_counter() - start
        self.pictures += len(pictures)
        return pictures

    def _init(self, job: Job) -> InitPicture:
        assert job.init is not None and job.draw.init is not None, "a job that draws from a picture"
        image = read_picture(job.init.path)
        mask = None if self.record.mask is None else read_mask(self.record.mask.path)
        return init_picture(image, mask, (job.draw.width, job.draw.height), job.draw.init)

    def _count_step(self, i: int) -> None:
        self.steps += 1

    def _write(self, batch: Batch, pictures: Sequence[Image.Image]) -> None:
        for job, picture in zip(batch, pictures, strict=True):
            kept = self.keep and self._read(job) is not None
            if self.save and not kept:
                write_png(job.path, picture, self.record.texts(job.prompt, job.seed, job.draw, job.init))

    def _read(self, job: Job) -> Image.Image | None:
        return read_whole_picture(job.path, (job.draw.width, job.draw.height))

    def summary(self) -> str:
        """Return a line on what was drawn, and how fast."""
        if not self.pictures:
            whose = "of this run" if world_size() == 1 else "of the first process's share"
            return f"nothing left to draw: all pictures {whose} are there"
        rate, pace = self.pictures / self.seconds, self.sampling_seconds / self.steps
        who = f"the first of {world_size()} processes: " if world_size() > 1 else ""
        return f"{who}{self.pictures} pictures in {self.seconds:.1f} s: {rate:.3g} pictures/s, {pace:.3g} s/step"


class LaunchMark:
    """A hidden file that torchrun's run has in its folder from its first picture to its last.

    By it, restarted processes know that settings.yaml is of their own run: they go on with that one, as --resume does.
    """

    def __init__(self, outdir: Path):
        self.path = outdir / ".begun-by-torchrun"

    def goes_on(self) -> bool:
        """Return True for restarted processes whose run has begun. Else remove what another run left."""
        if not restarted():
            if rank() == 0:
                self.remove()
            return False
        return self.path.exists()

    def set(self) -> None:
        """Write the file, if torchrun started this process."""
        if "LOCAL_RANK" in os.environ:
            self.path.touch()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
