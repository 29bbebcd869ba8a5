"""Grids of pictures that show how a training goes."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torchvision.utils import make_grid, save_image

from dsdiff.training.modules import Batch, TrainingModule


class SampleGrids(pl.Callback):
    """Write the pictures of `TrainingModule.sample_images` as PNG grids, every so many steps.

    folder: where the files go, named by step and grid. every: steps between them; 0 writes none.
    batch: the data from which the model draws, always the same.
    """

    def __init__(self, folder: Path, every: int, batch: Batch) -> None:
        self.folder, self.every, self.batch = folder, every, batch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        due = self.every and trainer.global_step % self.every == 0 and trainer.is_global_zero
        if not due or not isinstance(pl_module, TrainingModule):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        batch = {k: v.to(pl_module.device) if torch.is_tensor(v) else v for k, v in self.batch.items()}
        pl_module.eval()
        for name, images in pl_module.sample_images(batch).items():
            grid = make_grid(images.float().clamp(-1, 1) / 2 + 0.5, nrow=4)
            save_image(grid, self.folder / f"{trainer.global_step:06d}-{name}.png")
        pl_module.train()
