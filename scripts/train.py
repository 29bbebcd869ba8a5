#!/usr/bin/env python
"""Train a part of the embedded model from a config: python scripts/train.py --config configs/shapes/txt2img.yaml

The run lives in runs/<name of the config>: its last checkpoint, a CSV log, sample grids. It may be interrupted; the
same command then goes on from the last checkpoint. At the end the weights are written in float16 to the config's
`export`.
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

from dsdiff.cli.console import ArgumentParser, command, number
from dsdiff.pipeline import choose_device, read_config
from ldm.checkpoint import is_training_only, read_weights, save_checkpoint
from ldm.fileio import check_writable
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import instantiate_from_config


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--config", required=True, help="a file of configs/shapes: what to train, on what, for how long"
    )
    parser.add_argument("--outdir", type=Path, help="the run's folder (default: runs/<name of the config>)")
    parser.add_argument("--restart", action="store_true", help="begin anew although the folder holds a run")
    parser.add_argument("--max_steps", type=number(int, 1), help="stop after so many steps (default: the config's)")
    parser.add_argument("--export", help="where to write the float16 weights (default: the config's; '' writes none)")
    parser.add_argument("--export_only", action="store_true", help="write the weights of the run's last checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--devices", type=number(int, 1), default=1, help="GPUs, or processes on the CPU, where one a core is fastest"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of weights, order and noise")
    args = parser.parse_args(argv)
    args.outdir = args.outdir or Path("runs") / Path(args.config).stem
    args.last = args.outdir / "checkpoints" / "last.ckpt"
    return args


def read_settings(args: argparse.Namespace) -> DictConfig:
    """The config, with what the flags change in it. ValueError, before anything is trained, if it cannot work."""
    config = OmegaConf.create(read_config(Path(args.config)))
    lacking = [part for part in ("model", "data", "trainer") if part not in config]
    if lacking:
        raise ValueError(f"config {args.config!r} has no {', '.join(lacking)}: it does not describe a training")
    if args.max_steps:
        config.trainer.max_steps = args.max_steps
    if args.export is not None:
        config.trainer.export = args.export
    target = config.trainer.get("export")
    if target and Path(target).suffix != ".safetensors":
        raise ValueError(f"--export {target} must end in .safetensors")
    if args.export_only and not target:
        raise ValueError("--export_only has nowhere to write to: add --export FILE")
    if args.export_only and not args.last.exists():
        raise FileNotFoundError(f"no checkpoint at {str(args.last)!r}: train first")
    check_writable(args.outdir)
    return config


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


def build_trainer(options: DictConfig, args: argparse.Namespace, samples: SampleGrids) -> pl.Trainer:
    checkpoints = ModelCheckpoint(
        dirpath=args.last.parent,
        filename=args.last.stem,
        every_n_train_steps=options.checkpoint_every,
        save_on_exception=True,
        enable_version_counter=False,  # one file, replaced each time
    )
    return pl.Trainer(
        accelerator="gpu" if choose_device(args.device).type == "cuda" else "cpu",
        devices=args.devices,
        # Buffers are averages of weights that are the same everywhere: no need to send them round at each step.
        strategy=DDPStrategy(broadcast_buffers=False) if args.devices > 1 else "auto",
        max_steps=options.max_steps,
        precision=options.precision,
        gradient_clip_val=options.gradient_clip_val,
        logger=CSVLogger(args.outdir, name="log"),
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


def train(
    model: pl.LightningModule, config: DictConfig, args: argparse.Namespace, validation: DataLoader
) -> pl.Trainer:
    """Trains from the last checkpoint, if there is one, to the config's `max_steps`."""
    initialise(model, config.trainer.get("init_from"))
    batches = loader(config.data, "train", shuffle=True, devices=args.devices)
    samples = SampleGrids(args.outdir / "samples", config.trainer.log_images_every, next(iter(validation)))
    trainer = build_trainer(config.trainer, args, samples)
    start = 0
    if args.last.exists() and not args.restart:
        start = torch.load(args.last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    # Other noise and another order in each process, and after each interruption: nothing is seen twice for it.
    torch.manual_seed(args.seed + 1000 * start + int(os.environ.get("LOCAL_RANK", 0)))
    # On CPUs the fused kernel's backward is slower than plain matrix products, and the latents are small.
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
        trainer.fit(model, batches, validation, ckpt_path=args.last if start else None)
    trainer.save_checkpoint(args.last)  # also where max_steps is no multiple of checkpoint_every
    return trainer


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    config = read_settings(args)
    target = config.trainer.get("export")
    pl.seed_everything(args.seed, workers=True)
    model = instantiate_from_config(config.model)
    model.learning_rate = config.model.base_learning_rate
    validation = loader(config.data, "validation", shuffle=False, devices=args.devices)
    if args.export_only:
        state = torch.load(args.last, map_location="cpu", weights_only=True)
        model.load_state_dict(state["state_dict"])
        return export(model, target, {"config": args.config, "steps": state["global_step"]}, validation)
    trainer = train(model, config, args, validation)
    if target and trainer.is_global_zero and trainer.global_step >= config.trainer.max_steps:
        export(model, target, {"config": args.config, "steps": trainer.global_step}, validation)


if __name__ == "__main__":
    main()
