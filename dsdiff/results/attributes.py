"""Draw captions of shapes and judge the pictures, which are kept: an interrupted run goes on where it stopped."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from dsdiff.draw_settings import DrawSettings
from dsdiff.metrics.attributes import Judged, judge_sources, tensor_of
from dsdiff.pipeline import Pipeline
from dsdiff.results.drawing import DrawModel, DrawTask
from ldm.data.reader import ShapesReader
from ldm.data.shapes import ShapesDataset, caption


def judge_model(
    model: DrawModel,
    pipeline: Pipeline,
    settings: DrawSettings,
    *,
    split: str,
    n: int,
    seed: int,
    reader: ShapesReader,
    batch_size: int,
    outdir: Path,
) -> Judged:
    """Draw and judge n captions of a split, "test" or "heldout".

    Beside the generated pictures there are two ceilings: real pictures of the same captions (rendered), and these after
    encoding and decoding (autoencoder). pipeline: the opened model. seed: of the captions; picture i starts from the
    noise of seed + i. The generated ones are kept in outdir/pictures, and drawn only if they are not there.
    """
    data = ShapesDataset(n, split, settings.height, seed)
    specs = [data.spec(i) for i in range(n)]
    task = DrawTask.plan(
        model,
        settings,
        title=split,
        prompts=[caption(spec) for spec in specs],
        seed=seed,
        batch_size=batch_size,
        root=outdir / "pictures",
        name=split,
    )
    task.draw(pipeline)

    def rendered(part: slice) -> Tensor:
        return tensor_of([data.picture(i) for i in range(part.start, part.stop)])

    def generated(part: slice) -> Tensor:
        return tensor_of([Image.open(path) for path in task.paths[part]])

    def decoded(part: slice) -> Tensor:
        return pipeline.decode(pipeline.encode(rendered(part)))

    sources = {"generated": generated, "autoencoder": decoded, "rendered": rendered}
    return judge_sources(split, specs, sources, reader, batch_size)
