"""Scores, features and attributes on a GPU, against the CPU; the doctor, and the server's memory."""

import pytest
import torch

from dsdiff.metrics.extractors import FeatureStore, choose_extractor
from ldm.data.shapes import ShapesDataset, caption
from scripts import doctor, eval_attributes, eval_fid


class Pictures:
    """Pictures of shapes, as a FeatureStore reads them."""

    def __init__(self, count):
        self.data = ShapesDataset(count, "heldout", 256, 0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return ((self.data[i]["image"].permute(2, 0, 1) + 1) * 127.5).round().to(torch.uint8)


def test_features_of_pictures(psnr):
    found = [
        FeatureStore(choose_extractor("shapes"), torch.device(device), 8, None).extract(Pictures(20)).vectors
        for device in ("cuda", "cpu")
    ]
    assert found[0].device.type == "cpu" and psnr(*found) > 80


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of pictures that say their prompts and seeds."""
    from PIL.PngImagePlugin import PngInfo

    made = []
    for seed in (0, 1):
        folder, data = tmp_path_factory.mktemp("pictures"), ShapesDataset(12, "heldout", 256, seed)
        for i in range(len(data)):
            info = PngInfo()
            info.add_text("prompt", caption(data.spec(i)))
            info.add_text("seed", str(i))
            data.picture(i).save(folder / f"{i:05}.png", pnginfo=info)
        made.append(str(folder))
    return made


def test_eval_fid_and_attributes(folders, tmp_path, capsys):
    eval_fid.main(
        [
            folders[0],
            "--reference",
            folders[1],
            "--features",
            "shapes",
            "--device",
            "cuda",
            "--no_cache",
            "--outdir",
            str(tmp_path),
        ]
    )
    assert "fid" in capsys.readouterr().out.lower()
    eval_attributes.main(["--n", "4", "--ddim_steps", "3", "--device", "cuda", "--outdir", str(tmp_path / "drawn")])
    assert "heldout" in capsys.readouterr().out


def test_the_doctor_names_the_gpu(capsys, tmp_path):
    doctor.main(["--outdir", str(tmp_path)])
    assert torch.cuda.get_device_name(0) in capsys.readouterr().out


def test_the_servers_memory():
    pytest.importorskip("fastapi")
    from types import SimpleNamespace

    from dsdiff.server.api import Api

    memory = Api.memory(SimpleNamespace())
    system = memory["cuda"]["system"]
    assert 0 < system["used"] < system["total"] and system["free"] + system["used"] == system["total"]
