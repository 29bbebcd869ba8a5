"""One training run: from a config to a model, its checkpoints, and the exported weights."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

import tomesd
from dsdiff.environment import choose_device
from dsdiff.training.modules import training_module
from dsdiff.training.options import (
    DataConfig,
    InitialWeights,
    TrainerConfig,
    TrainingConfig,
    TrainingOptions,
    read_training_config,
)
from dsdiff.training.samples import SampleGrids
from dsdiff.training.stopping import StopAfterStep
from ldm.checkpoint import is_training_only, read_weights, save_checkpoint
from ldm.fileio import only_run_in, write_atomically, write_errors_naming
from ldm.lora import save_lora
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.consistency_distillation import ConsistencyDistillation
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config


def run(options: TrainingOptions) -> Path | None:
    """Train as the options say, going on from the run's last checkpoint; return the file of exported weights.

    None is returned where no weights are written: nowhere to write them, fewer steps than asked for, or a process
    that is not the first. Raises OSError or ValueError for a config or options that cannot work.
    """
    config = read_training_config(options)
    pl.seed_everything(options.seed, workers=True)
    model: nn.Module = instantiate_from_config(config.model)
    validation = loader(config.data, config.data.validation, shuffle=False, devices=options.devices)
    if options.export_only:
        state = torch.load(options.last, map_location="cpu", weights_only=True)
        model.load_state_dict(state["state_dict"])
        steps = state["global_step"]
    else:
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        with only_run_in(options.folder) if first else nullcontext(), write_errors_naming(options.folder):
            trainer = train(model, config, options, validation)
        steps = trainer.global_step
        if not trainer.is_global_zero or steps < config.trainer.max_steps:
            return None
    if config.trainer.export is not None:
        export(model, config.trainer.export, {"config": options.config, "steps": steps}, validation)
    return config.trainer.export


def train(model: nn.Module, config: TrainingConfig, options: TrainingOptions, validation: DataLoader) -> pl.Trainer:
    """Train a model from the run's last checkpoint, if there is one, to the config's `max_steps`."""
    initialise(model, config.trainer.init_from)
    if config.trainer.merge is not None:
        tomesd.apply_patch(model, **asdict(config.trainer.merge))
    batches = loader(config.data, config.data.train, shuffle=True, devices=options.devices)
    samples = SampleGrids(options.folder / "samples", config.trainer.log_images_every, next(iter(validation)))
    stop = StopAfterStep()
    trainer = build_trainer(config.trainer, options, [samples, stop])
    start = 0
    check_same_run(config, options)
    if options.last.exists() and not options.restart:
        start = torch.load(options.last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    # Each process, and each resumed part, draws other noise and another order, so that no batch is repeated.
    torch.manual_seed(options.seed + 1000 * start + int(os.environ.get("LOCAL_RANK", 0)))
    module = training_module(model, config.learning_rate)
    if config.trainer.compile and choose_device(options.device).type == "cuda":
        module.compile_network()
    trainer.fit(module, batches, validation, ckpt_path=options.last if start else None)
    trainer.save_checkpoint(options.last)  # also where max_steps is no multiple of checkpoint_every
    stop.end(f"{trainer.global_step} of {config.trainer.max_steps} steps are done; the same command goes on")
    return trainer


def check_same_run(config: TrainingConfig, options: TrainingOptions) -> None:
    """Raise ValueError if the run in the folder is of another model or of other data; else note what this one is of.

    How long a run is, and along what learning rates, may change while it lasts.
    """
    model = {name: value for name, value in config.model.items() if name != "params"}
    params = {name: value for name, value in config.model.get("params", {}).items() if name != "scheduler_config"}
    data = asdict(config.data)
    own = {"model": model | {"params": params}, **{f"data.{name}": value for name, value in data.items()}}
    own = json.loads(json.dumps(own, default=str))
    path = options.folder / "settings.json"
    if options.last.exists() and not options.restart and path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in own if old.get(name) != own[name]]
        if differ:
            raise ValueError(
                f"the run in {str(options.folder)!r} has another {', '.join(differ)} than {str(options.config)!r}: "
                "give another --outdir, or begin anew with --restart"
            )
    options.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda to: to.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8"))


def loader(data: DataConfig, dataset: Mapping[str, Any], shuffle: bool, devices: int = 1) -> DataLoader:
    """Return the batches of a data set, each shared out to the devices.

    Raises ValueError if the batch size is no multiple of the number of devices.
    """
    if data.batch_size % devices:
        raise ValueError(f"batches of {data.batch_size} cannot be shared by {devices} devices: use another --devices")
    return DataLoader(
        instantiate_from_config(dataset),
        batch_size=data.batch_size // devices,
        shuffle=shuffle,
        num_workers=data.num_workers,
        drop_last=shuffle,
        persistent_workers=data.num_workers > 0,
    )


def build_trainer(config: TrainerConfig, options: TrainingOptions, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """Return the trainer, which keeps one checkpoint and a CSV log in the run's folder."""
    checkpoints = ModelCheckpoint(
        dirpath=options.last.parent,
        filename=options.last.stem,
        every_n_train_steps=config.checkpoint_every,
        enable_version_counter=False,  # one file, replaced each time
    )
    return pl.Trainer(
        accelerator="gpu" if choose_device(options.device).type == "cuda" else "cpu",
        devices=options.devices,
        # Buffers are averages of weights that are equal in all processes: they need not be sent at each step.
        strategy=DDPStrategy(broadcast_buffers=False) if options.devices > 1 else "auto",
        max_steps=config.max_steps,
        precision=cast(Any, config.precision),  # checked by Lightning
        gradient_clip_val=config.gradient_clip_val,
        logger=CSVLogger(options.folder, name="log"),
        callbacks=[checkpoints, TQDMProgressBar(refresh_rate=10), *callbacks],
        val_check_interval=config.checkpoint_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=50,
    )


def initialise(model: nn.Module, init_from: Mapping[str, InitialWeights]) -> None:
    """Fill parts of a model from files: prefix of the model's keys -> weights whose keys lack the prefix.

    Raises ValueError for a file that does not hold exactly the weights of its part.
    """
    for prefix, source in init_from.items():
        weights = {
            prefix + name.removeprefix(source.prefix): value.float() if value.is_floating_point() else value
            for name, value in read_weights(source.file).items()
            if name.startswith(source.prefix)
        }
        _, unexpected = model.load_state_dict(weights, strict=False)
        expected = {name for name in model.state_dict() if name.startswith(prefix)}
        if unexpected or expected - weights.keys():
            raise ValueError(f"{source.file} does not fit the part {prefix!r} of {type(model).__name__}")


def export(model: nn.Module, path: Path, facts: Mapping[str, Any], pictures: DataLoader) -> None:
    """Write a model's weights for inference, in float16, with `facts` in the file's header.

    A latent diffusion model is written with its averaged weights, and so is a LoRA, in kohya's format. The latents of
    an autoencoder are first normalised over `pictures`, so that a model on top of it has the scale factor 1.
    """
    if isinstance(model, ConsistencyDistillation):
        with model.average.average_parameters(model.factors):
            save_lora(model.changes(), path, model.layers, metadata=facts)
        return
    if isinstance(model, AutoencoderKL):
        model.eval().normalise_latents(torch.cat([model.get_input(batch) for batch in pictures]))
    with model.ema_scope() if isinstance(model, LatentDiffusion) else nullcontext():
        weights = {name: value for name, value in model.state_dict().items() if not is_training_only(name)}
        save_checkpoint(weights, path, metadata=facts)
