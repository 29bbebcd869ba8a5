"""Grids: pages of pictures side by side."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dsdiff.images.png import write_png

GAP = 2  # pixels between pictures
PICTURES = 64  # on one page, or one row if that is longer


class Grids:
    """Collects pictures in their order into the pages `grid-0000.png`, and so on, in the folder `outdir`.

    first: the number of the first page. columns: pictures in a row.
    """

    def __init__(self, outdir: Path, first: int, columns: int):
        self.outdir, self.number, self.columns = outdir, first, columns
        self.limit = max(PICTURES // columns, 1) * columns
        self.pictures: list[Image.Image] = []

    def add(self, pictures: Sequence[Image.Image]) -> None:
        """Take in pictures, and write the pages that they fill."""
        for picture in pictures:
            self.pictures.append(picture)
            if len(self.pictures) == self.limit:
                self.flush()

    def flush(self) -> None:
        """Write the page that is not full yet, if it holds anything."""
        if self.pictures:
            write_png(self.outdir / f"grid-{self.number:04}.png", tile(self.pictures, self.columns))
            self.number, self.pictures = self.number + 1, []


def tile(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Return the pictures in rows from the top left, on black, each in a field of the largest width and height."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = (max(sides) + GAP for sides in zip(*(picture.size for picture in pictures), strict=True))
    page = Image.new("RGB", (columns * width + GAP, rows * height + GAP))
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * width + GAP, i // columns * height + GAP))
    return page
