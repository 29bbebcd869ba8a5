"""Encode a data set's latents once and keep them on disk, so that training does not run the autoencoder."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.checkpoint import read_weights
from ldm.fileio import file_sha256, write_atomically
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import instantiate_from_config


class CachedLatents(Dataset):
    """Posterior moments [2C, h, w] and captions of the data set that the config `dataset` describes.

    `autoencoder` is the config file of an AutoencoderKL and `ckpt` its weights. The cache, float16, lies in `folder`.
    Its name is a hash of everything it depends on: the data set's config, some of its items, and the weights.
    """

    def __init__(self, dataset: dict, autoencoder: str, ckpt: str, folder: str, batch_size: int = 16):
        self.source = instantiate_from_config(dataset)
        digest = hashlib.sha256(file_sha256(ckpt).encode())
        digest.update(json.dumps(OmegaConf.to_container(OmegaConf.create(dict(dataset))), sort_keys=True).encode())
        for i in range(min(8, len(self.source))):  # these change with the code that draws them
            digest.update(self.source[i]["image"].numpy().tobytes() + self.source[i]["caption"].encode())
        path = Path(folder) / f"{digest.hexdigest()[:16]}.npy"
        if not path.exists():
            self._encode(path, autoencoder, ckpt, batch_size)
        self.moments = np.load(path, mmap_mode="r")
        self.captions = json.loads(path.with_suffix(".json").read_text())

    def _encode(self, path: Path, autoencoder: str, ckpt: str, batch_size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        model = instantiate_from_config(OmegaConf.load(autoencoder).model)
        model.load_state_dict({name: value.float() for name, value in read_weights(ckpt).items()})
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device, memory_format=torch.channels_last).eval()

        def write(temporary: Path) -> None:
            captions = self._write_moments(temporary, model, batch_size)
            path.with_suffix(".json").write_text(json.dumps(captions))

        write_atomically(path, write)

    def _write_moments(self, file: Path, model: AutoencoderKL, batch_size: int) -> list[str]:
        """Encode all pictures into `file` and return their captions."""
        moments: np.memmap | None = None
        captions: list[str] = []
        with tqdm(total=len(self.source), desc="encoding", unit="picture", smoothing=0.05) as bar:
            for batch in DataLoader(self.source, batch_size=batch_size, num_workers=1):
                with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
                    encoded = model.encode(model.get_input(batch).to(model.device)).parameters.float().cpu()
                if moments is None:
                    shape = (len(self.source), *encoded.shape[1:])
                    moments = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
                moments[len(captions) : len(captions) + len(encoded)] = encoded.numpy()
                captions += batch["caption"]
                bar.update(len(encoded))
        if moments is not None:
            moments.flush()
        return captions

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict:
        return {"moments": torch.from_numpy(self.moments[index].copy()), "caption": self.captions[index]}
