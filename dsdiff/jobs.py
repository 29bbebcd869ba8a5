"""Jobs: the pictures that a run draws, without those that exist already, shared out to the processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from dsdiff.draw_settings import DrawSettings
from dsdiff.images.init import FileRecord
from dsdiff.images.png import to_pictures, write_png
from dsdiff.pipeline import Pipeline
from dsdiff.record import RunRecord
from qdiff.distributed import own_share, rank


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to draw, and where it goes. init: the picture that it is drawn from; None for none."""

    prompt: str
    seed: int
    path: Path
    draw: DrawSettings
    init: FileRecord | None = None


# --- prompts -----------------------------------------------------------------------------------------------


def read_prompt_file(path: Path, flag: str) -> list[str]:
    """Return the prompts in a text file, one a line; empty lines are left out.

    flag: names the file in messages. Raises ValueError if it holds none or is no UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {str(path)!r} is no UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{flag} {str(path)!r} holds no prompts: write one per line")
    return prompts


def check_text(prompts: Sequence[str]) -> None:
    """Raise ValueError for a prompt with stray bytes of the command line in it."""
    for text in prompts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {text!r} is no valid text: use UTF-8") from error


# --- a run's jobs ------------------------------------------------------------------------------------------


def next_number(folder: Path, prefix: str) -> int:
    """Return one more than the highest number of the PNGs `prefix`NUMBER.png in `folder`, or 0."""
    names = [path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.png")]
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=-1) + 1


def jobs_of(record: RunRecord, outdir: Path) -> list[list[Job]]:
    """Return a run's pictures in batches. A resumed run has the same batches, so that rounding is the same too.

    Rows with settings of their own share a batch with neighbours of the same settings.
    """
    jobs = [
        Job(
            prompt=record.prompts[i % len(record.prompts)],
            seed=_seed(record, i),
            path=outdir / "samples" / f"{record.first + i:05}.png",
            draw=record.row_draws[i % len(record.row_draws)] if record.row_draws else record.draw,
            init=record.inits[i % len(record.inits)] if record.inits else None,
        )
        for i in range(record.pictures)
    ]
    alike = [list(group) for _, group in groupby(jobs, key=lambda job: job.draw)]
    return [
        group[start : start + record.n_samples] for group in alike for start in range(0, len(group), record.n_samples)
    ]


def _seed(record: RunRecord, i: int) -> int:
    """Return the seed of picture i: the run's plus i, or its row's own plus the number of the round."""
    own = record.rows[i % len(record.rows)].seed if record.rows else None
    start, count = (record.seed, i) if own is None else (own, i // len(record.rows))
    return start if record.fixed_code else start + count


def draw_missing(
    pipeline: Callable[[], Pipeline],
    prompts: Sequence[str],
    seeds: Sequence[int],
    paths: Sequence[Path],
    settings: DrawSettings,
    batch_size: int,
    title: str,
) -> None:
    """Draw the pictures that are not there, a PNG each with its prompt and seed. Several processes share the batches.

    pipeline: called if there is anything to draw. Batches are always the same, so that an interrupted run ends with the
    same pictures, bit for bit. title: of the bar.
    """
    parts = [slice(start, start + batch_size) for start in range(0, len(paths), batch_size)]
    missing = [part for part in own_share(parts) if not all(path.exists() for path in paths[part])]
    if not missing:
        return
    drawing = pipeline()
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(paths[part]) for part in missing)
    with tqdm(total=total, desc=title, unit="picture", disable=rank() != 0) as bar:
        for part in missing:
            images = drawing.decode(drawing.sample(prompts[part], seeds[part], settings), settings)
            for path, prompt, seed, picture in zip(
                paths[part], prompts[part], seeds[part], to_pictures(images), strict=True
            ):
                if not path.exists():
                    write_png(path, picture, {"prompt": prompt, "seed": str(seed)})
            bar.update(len(images))
