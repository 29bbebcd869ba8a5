"""Grids of pictures, and their pages."""

import numpy as np
from PIL import Image

from dsdiff.images.grids import Grids, tile


def test_rows_and_pages(tmp_path):
    pictures = [Image.new("RGB", (4, 2), (i + 1, 0, 0)) for i in range(7)]
    page = tile(pictures, 3)
    assert page.size == (3 * 6 + 2, 3 * 4 + 2)
    pixels = np.asarray(page)[..., 0]
    assert pixels[2::4, 2::6].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    grids = Grids(tmp_path, first=3, columns=40)
    grids.add(pictures * 6)
    grids.flush()
    assert [Image.open(tmp_path / name).size for name in sorted(path.name for path in tmp_path.iterdir())] == [
        (40 * 6 + 2, 6),
        (2 * 6 + 2, 6),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid-0003.png", "grid-0004.png"]
