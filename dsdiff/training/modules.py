"""Lightning modules: a model of ldm with its training step, optimizer and logging.

The model stays as it is, an `nn.Module` that knows nothing of Lightning. Checkpoints hold its state_dict under the
model's own names, so that `ldm.util.load_model_from_config` reads the checkpoint of a run as well.
"""

from collections.abc import Mapping
from functools import reduce
from itertools import chain
from operator import add
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.data.reader import ShapesReader, reader_losses
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import Contrast, ContrastiveModel
from ldm.models.consistency_distillation import ConsistencyDistillation
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.lcm import LCMSampler
from ldm.models.tiny_distillation import TinyDistillation
from ldm.util import instantiate_from_config

Batch = Mapping[str, Any]
PREFIX = "model."  # the module's name for the model's weights


class TrainingModule(pl.LightningModule):
    """Hold a model while it is trained at `learning_rate`; subclasses know its objective."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def sample_images(self, batch: Batch) -> dict[str, Tensor]:
        """Return pictures [n, 3, H, W] in [-1, 1] that show what the model can do, by the name of their grid."""
        return {}

    def compile_network(self) -> None:
        """Compile what takes most of a training step's time. Raise ValueError where nothing is worth it."""
        raise ValueError(f"compile is for a LatentDiffusion: nothing of this {type(self.model).__name__} is compiled")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.model.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {PREFIX + name: value for name, value in checkpoint["state_dict"].items()}


class AutoencoderTraining(TrainingModule):
    """Train an AutoencoderKL on the objective of its config."""

    model: AutoencoderKL

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = self.model.get_input(batch)
        loss, parts = self.model.loss(inputs, *self.model(inputs))
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        inputs = self.model.get_input(batch)
        _, parts = self.model.loss(inputs, *self.model(inputs, sample_posterior=False))
        self.log_dict({f"val/{name}": value for name, value in parts.items()}, prog_bar=True, batch_size=len(inputs))

    @torch.no_grad()
    def sample_images(self, batch: Batch, n: int = 8) -> dict[str, Tensor]:
        """Return n pictures and their reconstructions."""
        inputs = self.model.get_input(batch)[:n]
        return {"inputs": inputs, "reconstructions": self.model(inputs, sample_posterior=False)[0]}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))
        return with_scheduler(optimizer, self.model.scheduler_config)


class TinyDecoderTraining(TrainingModule):
    """Train the decoder of a TinyDistillation to make an autoencoder's latents into pictures."""

    model: TinyDistillation

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = self.model.autoencoder.get_input(batch)
        loss, parts = self.model.objective(inputs, self.model(inputs))
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        inputs = self.model.autoencoder.get_input(batch)
        _, parts = self.model.objective(inputs, self.model(inputs, sample=False))
        self.log_dict({f"val/{name}": value for name, value in parts.items()}, prog_bar=True, batch_size=len(inputs))

    @torch.no_grad()
    def sample_images(self, batch: Batch, n: int = 8) -> dict[str, Tensor]:
        """Return n pictures, and what the tiny decoder makes of their latents."""
        inputs = self.model.autoencoder.get_input(batch)[:n]
        return {"inputs": inputs, "reconstructions": self.model(inputs, sample=False)}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))
        return with_scheduler(optimizer, self.model.scheduler_config)


class DiffusionTraining(TrainingModule):
    """Train the UNet of a LatentDiffusion, with its text encoder if that is trainable, and average their weights."""

    model: LatentDiffusion

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model(batch)
        self.log("train/loss_simple", loss.detach(), prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        model = self.model
        if model.use_ema:
            model.model_ema(model.model)
            if model.cond_stage_trainable:
                model.cond_stage_ema(model.cond_stage_model)

    @torch.compiler.set_stance("force_eager")  # compiled is the training step alone
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)  # the same noise each time, so that losses can be compared
            with self.model.ema_scope():
                loss = self.model(batch)
        size = len(batch[self.model.cond_stage_key])
        self.log("val/loss_simple_ema", loss, prog_bar=True, batch_size=size)

    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def sample_images(self, batch: Batch, n: int = 16, steps: int = 25, scale: float = 4.0) -> dict[str, Tensor]:
        """Return pictures drawn from the batch's first n captions with guidance, always from the same noise."""
        model = self.model
        captions = list(batch[model.cond_stage_key])[:n]
        with model.ema_scope():
            samples, _ = DDIMSampler(model).sample(
                steps,
                len(captions),
                tuple(model.get_input(batch).shape[1:]),
                conditioning=model.get_learned_conditioning(captions),
                unconditional_conditioning=model.get_learned_conditioning([""] * len(captions)),
                unconditional_guidance_scale=scale,
                generator=torch.Generator().manual_seed(0),
                verbose=False,
            )
        return {"samples": model.decode_first_stage(samples)}

    def compile_network(self) -> None:
        self.model.model.diffusion_model.compile(dynamic=False, mode="reduce-overhead")  # launches take long

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer changes: the UNet, and the text encoder if it is trainable."""
        text = self.model.cond_stage_model.parameters() if self.model.cond_stage_trainable else ()
        return [p for p in chain(self.model.model.parameters(), text) if p.requires_grad]

    def configure_optimizers(self) -> dict[str, Any]:
        parameters, betas = self.trained_parameters(), (0.9, 0.99)
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=betas, weight_decay=1e-2)
        return with_scheduler(optimizer, self.model.scheduler_config)


class ConsistencyTraining(TrainingModule):
    """Train the LoRA of a ConsistencyDistillation, and average its factors."""

    model: ConsistencyDistillation

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model(batch)
        self.log("train/consistency", loss.detach(), prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.model.average(self.model.factors)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)  # the same noise each time, so that losses can be compared
            loss = self.model(batch)
        self.log("val/consistency", loss, prog_bar=True, batch_size=len(batch[self.model.teacher.cond_stage_key]))

    @torch.no_grad()
    def sample_images(self, batch: Batch, n: int = 16, steps: int = 4) -> dict[str, Tensor]:
        """Return pictures drawn from the batch's first n captions in a few steps, always from the same noise."""
        with self.model.applied() as model:
            captions = list(batch[model.cond_stage_key])[:n]
            samples, _ = LCMSampler(model).sample(
                steps,
                len(captions),
                tuple(model.get_input(batch).shape[1:]),
                conditioning=model.get_learned_conditioning(captions),
                generator=torch.Generator().manual_seed(0),
                verbose=False,
            )
            return {"samples": model.decode_first_stage(samples)}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.model.factors.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))
        return with_scheduler(optimizer, self.model.scheduler_config)


class ReaderTraining(TrainingModule):
    """Train a ShapesReader. The learning rate is the peak of a one-cycle schedule over all steps."""

    model: ShapesReader

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = reader_losses(self.model(batch["image"]), batch)
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()})
        return reduce(add, losses.values())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = reader_losses(self.model(batch["image"]), batch)
        self.log_dict({f"val/{name}": loss for name, loss in losses.items()}, batch_size=len(batch["image"]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps, pct_start=0.15)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ContrastTraining(TrainingModule):
    """Train the two towers of a ContrastiveModel on captions that are right and captions that are wrong."""

    model: ContrastiveModel

    def contrast(self, batch: Batch) -> Contrast:
        return self.model(batch["image"], batch["caption"], batch["wrong"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        contrast = self.contrast(batch)
        loss = self.model.loss(contrast, batch["arrangement"])
        told_apart = contrast.told_apart.float().mean()
        self.log_dict({"train/loss": loss.detach(), "train/told_apart": told_apart}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the share of wrong captions that are further from their picture than the right one, also by kind."""
        contrast = self.contrast(batch)
        right, size = contrast.told_apart, len(contrast.told_apart)
        values = {"told_apart": right.float().mean(), "retrieved": contrast.retrieved.float().mean()}
        values["contrast_loss"] = self.model.contrast_loss(contrast)
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=True, batch_size=size)
        kinds = np.array(batch["kinds"]).T  # [B, K]
        for kind in np.unique(kinds):
            verdicts = right[torch.from_numpy(kinds == kind).to(right.device)]
            self.log(f"val/told_apart/{kind}", verdicts.float().mean(), batch_size=len(verdicts))

    def configure_optimizers(self) -> dict[str, Any]:
        # Decay is for matrices: scales, norms and embeddings of places keep their size.
        named = dict(self.model.named_parameters())
        plain = [p for name, p in named.items() if p.ndim < 2 or "embedding" in name]
        matrices = [p for name, p in named.items() if p.ndim >= 2 and "embedding" not in name]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98), eps=1e-6)
        return with_scheduler(optimizer, self.model.scheduler_config)


KINDS: Mapping[type[nn.Module], type[TrainingModule]] = {
    AutoencoderKL: AutoencoderTraining,
    LatentDiffusion: DiffusionTraining,
    ShapesReader: ReaderTraining,
    ContrastiveModel: ContrastTraining,
    TinyDistillation: TinyDecoderTraining,
    ConsistencyDistillation: ConsistencyTraining,
}


def training_module(model: nn.Module, learning_rate: float) -> TrainingModule:
    """Return the module that trains a model. Raise ValueError for a model of another kind than those of `KINDS`."""
    for kind, module in KINDS.items():
        if isinstance(model, kind):
            return module(model, learning_rate)
    names = ", ".join(kind.__name__ for kind in KINDS)
    raise ValueError(f"a {type(model).__name__} cannot be trained: use one of {names}")


def with_scheduler(optimizer: torch.optim.Optimizer, scheduler_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the optimizer with its learning-rate schedule (None: constant), as configure_optimizers must."""
    if scheduler_config is None:
        return {"optimizer": optimizer}
    factor = instantiate_from_config(scheduler_config)
    # A plain function, because LambdaLR would save an object's fields, and a resumed run not see a changed config.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: factor.schedule(step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
