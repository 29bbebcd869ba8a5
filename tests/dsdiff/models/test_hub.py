"""Names on the hub: its cache first, then a download of the needed files alone. Nothing here uses the network."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from dsdiff.models.hub import from_hub, is_hub_id, needed_files

NETWORKS = ("unet", "vae", "text_encoder")
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CONFIGS = [f"{network}/config.json" for network in NETWORKS]
WEIGHTS = [f"{network}/{STEMS[network]}.safetensors" for network in NETWORKS]
OTHERS = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
UNUSED = [
    "v1-5.ckpt",
    "unet/diffusion_pytorch_model.bin",
    "safety_checker/model.safetensors",
    "README.md",
    "vae/x.onnx",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, without a network."""

    def no_network():
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "get_session", no_network)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill(cache, names, repository="owner/name", revision="main"):
    """Put empty files into the cache as the hub's library does; return their folder."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text("c0ffee")
    for name in names:
        path = place / "snapshots/c0ffee" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return place / "snapshots/c0ffee"


def test_what_is_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("owner/name", "owner/na-me_1.5", "a/b@main", "a/b@refs/pr/3"):
        assert is_hub_id(Path(text)), text
    for text in ("name", "a/b/c", "/a/b", "a/model.safetensors", "a/model.ckpt", "../a", "a/b@", "a b/c"):
        assert not is_hub_id(Path(text)), text
    (tmp_path / "owner/name").mkdir(parents=True)
    assert not is_hub_id(Path("owner/name"))
    assert from_hub(Path("owner/name")) == Path("owner/name")


def test_the_cache_comes_first(cache):
    folder = fill(cache, [*CONFIGS, *WEIGHTS, *OTHERS])
    assert from_hub(Path("owner/name")) == folder
    assert from_hub(Path("owner/name@main")) == folder
    fill(cache, ["config.json", "diffusion_pytorch_model.safetensors"], "owner/vae")
    assert from_hub(Path("owner/vae"), ("vae",)).name == "c0ffee"


def test_what_cannot_be_had_is_told_in_a_line(cache):
    fill(cache, [*CONFIGS, *WEIGHTS[1:], *OTHERS])  # the UNet's weights are missing
    for name in ("owner/name", "owner/name@other", "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .* cannot be had from the hub") as caught:
            from_hub(Path(name))
        assert "\n" not in str(caught.value)


def test_only_needed_files_are_downloaded(cache, monkeypatch):
    fetched = []

    def download(repository, name, revision=None):
        fetched.append(name)
        return str(fill(cache, [name], repository) / name)

    siblings = [SimpleNamespace(rfilename=name) for name in (*UNUSED, *CONFIGS, *WEIGHTS, *OTHERS)]
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda url, timeout: None))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, name, **more: SimpleNamespace(siblings=siblings)
    )
    folder = from_hub(Path("owner/name"))
    assert sorted(fetched) == sorted([*CONFIGS, *WEIGHTS, *OTHERS])
    assert (folder / "unet/config.json").is_file()
    assert from_hub(Path("owner/name")) == folder and len(fetched) == len(set(fetched))


def test_shards_and_variants(tmp_path):
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "gone.bin"}}))
    names = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors.index.json", "vae/one.safetensors"]
    names += ["vae/two.safetensors", "vae/three.safetensors"]
    found = list(needed_files(names, ("vae",), lambda name: index))
    assert found == [*names[:2], "vae/one.safetensors", "vae/two.safetensors"]
    alone = ["config.json", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"]
    assert list(needed_files(alone, ("vae",), shutil)) == alone[:2]
    with pytest.raises(FileNotFoundError, match=r"no unet as diffusers saves it; it holds 'sd-v1-4.ckpt'"):
        list(needed_files(["sd-v1-4.ckpt", "README.md"], NETWORKS, shutil))
