#!/usr/bin/env python
"""Train a part of the embedded model from a config: python scripts/train.py --config configs/shapes/txt2img.yaml

The run lives in runs/<name of the config>: checkpoints, a CSV log, sample grids. It may be interrupted at any time;
the same command goes on where it stopped. At the end the weights are written in float16 to the config's `export`.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.checkpoint import is_training_only, read_weights, save_checkpoint
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import instantiate_from_config
from scripts.common import ArgumentParser, command, number


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--config", required=True, help="a file of configs/shapes: what to train, on what, for how long"
    )
    parser.add_argument("--outdir", help="the run's folder (default: runs/<name of the config>)")
    parser.add_argument("--restart", action="store_true", help="begin anew although the folder holds a run")
    parser.add_argument("--max_steps", type=int, help="stop after so many steps (default: the config's)")
    parser.add_argument("--export", help="where to write the float16 weights (default: the config's; '' writes none)")
    parser.add_argument("--export_only", action="store_true", help="write the weights of the run's last checkpoint")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "gpu"], help="where to train")
    parser.add_argument(
        "--devices", type=number(int, 1), default=1, help="GPUs, or processes on the CPU, where one a core is fastest"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    return parser.parse_args(argv)


class SampleGrids(pl.Callback):
    """Writes what the model's `log_images` shows every so many steps as PNG grids."""

    def __init__(self, folder: Path, every: int, batch: dict):
        self.folder, self.every, self.batch = folder, every, batch

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        if self.every and trainer.global_step % self.every == 0 and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            batch = {k: v.to(module.device) if torch.is_tensor(v) else v for k, v in self.batch.items()}
            module.eval()
            for name, images in module.log_images(batch).items():
                grid = make_grid(images.float().clamp(-1, 1) / 2 + 0.5, nrow=4)
                save_image(grid, self.folder / f"{trainer.global_step:06d}-{name}.png")
            module.train()


def loader(data: DictConfig, part: str, shuffle: bool, devices: int = 1) -> DataLoader:
    """Batches of the config's size, shared out to the devices."""
    if data.batch_size % devices:
        raise ValueError(f"batches of {data.batch_size} cannot be shared by {devices} devices: use another --devices")
    return DataLoader(
        instantiate_from_config(data[part]),
        batch_size=data.batch_size // devices,
        shuffle=shuffle,
        num_workers=data.num_workers,
        drop_last=shuffle,
        persistent_workers=data.num_workers > 0,
    )


def build_trainer(options: DictConfig, outdir: Path, args: argparse.Namespace, samples: SampleGrids) -> pl.Trainer:
    checkpoints = ModelCheckpoint(
        dirpath=outdir / "checkpoints", every_n_train_steps=options.checkpoint_every, save_last=True, save_top_k=1
    )
    return pl.Trainer(
        accelerator=args.device,
        devices=args.devices,
        # Buffers are averages of weights that are the same everywhere: no need to send them round at each step.
        strategy=DDPStrategy(broadcast_buffers=False) if args.devices > 1 else "auto",
        max_steps=options.max_steps,
        precision=options.precision,
        gradient_clip_val=options.gradient_clip_val,
        logger=CSVLogger(outdir, name="log"),
        callbacks=[checkpoints, TQDMProgressBar(refresh_rate=10), samples],
        val_check_interval=options.checkpoint_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=50,
    )


def initialise(model: pl.LightningModule, init_from: DictConfig | None) -> None:
    """Fills parts of the model from files: {prefix of the model's keys: file with the keys without it}."""
    for prefix, path in (init_from or {}).items():
        weights = {prefix + name: value.float() for name, value in read_weights(path).items()}
        _, unexpected = model.load_state_dict(weights, strict=False)
        expected = {name for name in model.state_dict() if name.startswith(prefix)}
        if unexpected or expected - weights.keys():
            raise ValueError(f"{path} does not fit the part {prefix!r} of {type(model).__name__}")


def export(model: pl.LightningModule, path: str, facts: dict, pictures: DataLoader) -> None:
    """Writes the weights for inference, float16: averaged where the model keeps an average, an autoencoder's latents
    normalised over `pictures`, so that the scale factor of a model on top of it is 1."""
    if isinstance(model, AutoencoderKL):
        model.eval().normalise_latents(torch.cat([model.get_input(batch) for batch in pictures]))
    with model.ema_scope() if hasattr(model, "ema_scope") else nullcontext():
        weights = {name: value for name, value in model.state_dict().items() if not is_training_only(name)}
        save_checkpoint(weights, path, metadata=facts)
    print(f"wrote {path}")


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    config = OmegaConf.load(args.config)
    options = config.trainer
    outdir = Path(args.outdir or Path("runs") / Path(args.config).stem)
    last = outdir / "checkpoints" / "last.ckpt"
    if args.max_steps:
        options.max_steps = args.max_steps
    target = options.get("export") if args.export is None else args.export
    # Processes share the weights but not the noise.
    pl.seed_everything(args.seed + int(os.environ.get("LOCAL_RANK", 0)), workers=True)
    model = instantiate_from_config(config.model)
    model.learning_rate = config.model.base_learning_rate
    validation = loader(config.data, "validation", shuffle=False, devices=args.devices)
    if args.export_only:
        state = torch.load(last, map_location="cpu", weights_only=True)
        model.load_state_dict(state["state_dict"])
        return export(model, target, {"config": args.config, "steps": state["global_step"]}, validation)
    initialise(model, options.get("init_from"))
    train = loader(config.data, "train", shuffle=True, devices=args.devices)
    samples = SampleGrids(outdir / "samples", options.log_images_every, next(iter(validation)))
    trainer = build_trainer(options, outdir, args, samples)
    # On CPUs the fused kernel's backward is slower than plain matrix products, and the latents are small.
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
        trainer.fit(model, train, validation, ckpt_path=last if last.exists() and not args.restart else None)
    if target and trainer.is_global_zero and trainer.global_step >= options.max_steps:
        export(model, target, {"config": args.config, "steps": trainer.global_step}, validation)


if __name__ == "__main__":
    main()
