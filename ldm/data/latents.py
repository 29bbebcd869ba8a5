"""Encode a data set's latents once and keep them on disk, so that training does not run the autoencoder."""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ldm.checkpoint import read_weights
from ldm.fileio import file_sha256, write_atomically
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import instantiate_from_config


class CachedLatents(Dataset):
    """Posterior moments [2C, h, w] and captions of the data set that the config `dataset` describes.

    `autoencoder` is the config file of an AutoencoderKL and `ckpt` the file of its weights, whose names there begin
    with `prefix`. `workers` processes draw the pictures. The cache, float16, lies in `folder`, in parts of `part_size`
    items; after an interruption only the missing parts are encoded. The names of the files begin with a hash of
    everything they depend on: the data set's config, some of its items, and the weights.
    """

    def __init__(
        self,
        dataset: dict,
        autoencoder: str,
        ckpt: str,
        folder: str,
        batch_size: int = 16,
        part_size: int = 2000,
        prefix: str = "",
        workers: int = 1,
    ):
        self.source = instantiate_from_config(dataset)
        self.part_size, self.workers = part_size, workers
        digest = hashlib.sha256((file_sha256(ckpt) + prefix).encode())
        digest.update(json.dumps(OmegaConf.to_container(OmegaConf.create(dict(dataset))), sort_keys=True).encode())
        for i in range(min(8, len(self.source))):  # these change with the code that draws them
            digest.update(self.source[i]["image"].numpy().tobytes() + self.source[i]["caption"].encode())
        name, starts = digest.hexdigest()[:16], range(0, len(self.source), part_size)
        paths = [Path(folder) / f"{name}-{start:07d}-{part_size}.npy" for start in starts]
        missing = {path: start for path, start in zip(paths, starts, strict=True) if not path.exists()}
        if missing:
            self._encode(missing, read_autoencoder(autoencoder, ckpt, prefix), batch_size)
        self.moments = [np.load(path, mmap_mode="r") for path in paths]
        self.captions = [caption for path in paths for caption in json.loads(path.with_suffix(".json").read_text())]

    def _encode(self, missing: dict[Path, int], model: AutoencoderKL, batch_size: int) -> None:
        """Write the missing parts; `missing` has the index of the first item of each."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        there = len(self.source) - sum(len(self._items(start)) for start in missing.values())
        with tqdm(total=len(self.source), initial=there, desc="encoding", unit="picture", smoothing=0.05) as bar:
            for path, start in missing.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                moments, captions = self._encode_part(start, model, batch_size, bar)
                write_atomically(path.with_suffix(".json"), partial(_write_text, text=json.dumps(captions)))
                write_atomically(path, partial(_write_array, array=moments))  # last, since it tells that all is there

    def _items(self, start: int) -> range:
        """Return the items of the part that begins at `start`."""
        return range(start, min(start + self.part_size, len(self.source)))

    def _encode_part(
        self, start: int, model: AutoencoderKL, batch_size: int, bar: tqdm
    ) -> tuple[np.ndarray, list[str]]:
        """Return the moments, float16 [n, 2C, h, w], and the captions of the part that begins at `start`."""
        moments: list[np.ndarray] = []
        captions: list[str] = []
        for batch in DataLoader(
            Subset(self.source, self._items(start)), batch_size=batch_size, num_workers=self.workers
        ):
            pictures = {model.image_key: batch[model.image_key].to(model.device)}
            with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
                encoded = model.encode(model.get_input(pictures)).parameters
            moments.append(encoded.half().cpu().numpy())
            captions += batch["caption"]
            bar.update(len(encoded))
        return np.concatenate(moments), captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        part, place = divmod(index, self.part_size)
        return {"moments": torch.from_numpy(self.moments[part][place].copy()), "caption": self.captions[index]}


def read_autoencoder(config: str, ckpt: str, prefix: str = "") -> AutoencoderKL:
    """Return the autoencoder of a config file, with those weights of a file whose names begin with `prefix`."""
    model = instantiate_from_config(OmegaConf.load(config).model)
    weights = {name: value.float() for name, value in read_weights(ckpt).items() if name.startswith(prefix)}
    model.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
    return model


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a path, numpy would append .npy to it
        np.save(file, array)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
