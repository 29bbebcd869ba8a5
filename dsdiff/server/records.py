"""The text chunks of pictures that the server draws, the same as those of scripts/txt2img.py."""

from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import versions
from dsdiff.pipeline import Pipeline
from dsdiff.record import RunRecord
from dsdiff.server.requests import DrawRequest


def texts_of(pipeline: Pipeline, request: DrawRequest, settings: DrawSettings, seed: int) -> dict[str, str]:
    """Return the text chunks of the picture of a seed: prompt, seed, all settings, and what other tools read."""
    record = RunRecord(
        prompts=(request.prompt,),
        pictures=request.pictures,
        n_iter=-(-request.pictures // request.batch_size),
        n_samples=request.batch_size,
        seed=request.seed,
        fixed_code=False,
        draw=settings,
        inits=() if request.init_file is None else (request.init_file,),
        spec=pipeline.spec,
        device=pipeline.device.type,
        tokenizer=None if pipeline.tokenizer is None else str(pipeline.tokenizer),
        skip_grid=True,
        n_rows=request.batch_size,
        first=0,
        first_grid=0,
        versions=versions(),
    )
    return record.texts(request.prompt, seed, settings, request.init_file)
