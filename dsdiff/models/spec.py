"""A model before its weights are read: its files, its sizes, and its defaults for sampling."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsdiff.models.configs import config_for_drawing, look_up, read_config
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, STABLE_DIFFUSION
from dsdiff.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's files and facts.

    config: the whole config, plain. description: the model in words. height, width: of its pictures, in pixels.
    steps, scale: its defaults of sampling. channels: of the latents. factor: pixels per latent. timesteps: of the noise
    process. bundle: whether `ckpt` is a bundle, quantized and with its config in it.
    """

    config_path: Path
    config: Mapping[str, Any]
    ckpt: Path
    description: str
    height: int
    width: int
    steps: int
    scale: float
    channels: int
    factor: int
    timesteps: int
    bundle: bool = False

    def __str__(self) -> str:
        return f"{self.description} ({self.ckpt})"

    @property
    def embeds_guidance(self) -> bool:
        """True if the UNet takes the scale of guidance as an input, as full LCM checkpoints do."""
        return look_up(self.config, "model.params.unet_config.params.time_cond_proj_dim") is not None

    @property
    def output_blocks(self) -> int:
        """How many output blocks the UNet has, and as many input blocks."""
        unet = look_up(self.config, "model.params.unet_config.params")
        return len(unet.get("channel_mult", (1, 2, 4, 8))) * (unet["num_res_blocks"] + 1)

    @property
    def cali_ckpts(self) -> Mapping[int, Path]:
        """The cali_ckpts that come with the checkpoint, by the bits of its weights."""
        return CALI_CKPTS.get(self.ckpt.resolve(), {})

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weights' file, and of what drawing needs of the config, wherever its tokenizer lies."""
        from ldm.fileio import file_sha256

        architecture = yaml.safe_dump(config_for_drawing(self.config)).encode()
        return {"ckpt_sha256": file_sha256(self.ckpt), "config_sha256": hashlib.sha256(architecture).hexdigest()}


def find_model(options: ModelOptions, *, accept_bundle: bool = True) -> ModelSpec:
    """Return the model that the options mean. Reads the config, and of the checkpoint no more than its header.

    Raises FileNotFoundError or ValueError for files that are missing or no model's, and ValueError for a bundle where a
    float model is needed or another option contradicts it.
    """
    bundled = _bundled_config(options, accept_bundle)
    if bundled is not None:
        assert options.ckpt is not None, "only a checkpoint can be a bundle"
        return ModelSpec(
            config_path=options.ckpt, config=bundled, ckpt=options.ckpt, bundle=True, **_facts(bundled, options.ckpt)
        )
    config_path, ckpt = _choose_files(options.config, options.ckpt)
    if not ckpt.exists():
        raise FileNotFoundError(f"no checkpoint at {str(ckpt)!r}: give its path with --ckpt")
    if not ckpt.is_file():
        raise ValueError(f"{str(ckpt)!r} is not a file: give the path of a checkpoint with --ckpt")
    config = read_config(config_path)
    return ModelSpec(config_path=config_path, config=config, ckpt=ckpt, **_facts(config, config_path))


def _bundled_config(options: ModelOptions, accept: bool) -> dict[str, Any] | None:
    """Return the config in a bundle; None for a checkpoint of another kind."""
    from dsdiff.models.bundle import bundle_config

    config = bundle_config(options.ckpt) if options.ckpt is not None and options.ckpt.is_file() else None
    if config is None:
        return None
    if not accept:
        raise ValueError(
            f"{str(options.ckpt)!r} holds a quantized model: this command needs the float one's checkpoint"
        )
    for name in ("config", "tokenizer"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} has no effect: {str(options.ckpt)!r} brings its own; leave it out")
    return config


def _choose_files(config: Path | None, ckpt: Path | None) -> tuple[Path, Path]:
    """Return the config and the checkpoint that go together."""
    if config is not None and not config.exists():
        raise FileNotFoundError(f"no config at {str(config)!r}: give the path of a yaml with --config")
    if config is None and ckpt is None:
        known = [(path, file) for path, files in CHECKPOINTS.items() for file in files]
        found = next((pair for pair in known if pair[1].is_file()), None)
        if found is None:
            places = " and ".join(str(file) for _, file in known)
            raise FileNotFoundError(f"no checkpoint at {places}: put one there or give --config and --ckpt")
        return found
    if config is None:
        assert ckpt is not None
        path = ckpt.resolve()
        return next((name for name, files in CHECKPOINTS.items() if path in files), STABLE_DIFFUSION), ckpt
    if ckpt is None:
        files = CHECKPOINTS.get(config.resolve())
        if files is None:
            raise ValueError(f"--config {config} comes with no checkpoint: give one with --ckpt")
        return config, next((file for file in files if file.is_file()), files[0])
    return config, ckpt


# --- facts of a config --------------------------------------------------------------------------------------


def _facts(config: Any, path: Path) -> dict[str, Any]:
    """Return the sizes of a config's model and its defaults for sampling, as arguments of ModelSpec."""
    image_size = look_up(config, "model.params.image_size")
    ch_mult = look_up(config, "model.params.first_stage_config.params.ddconfig.ch_mult")
    sizes = {
        "channels": look_up(config, "model.params.channels"),
        "timesteps": look_up(config, "model.params.timesteps") or 1000,
        "factor": 2 ** (len(ch_mult) - 1) if isinstance(ch_mult, list) else None,
    }
    if not all(isinstance(size, int) and size > 0 for size in (image_size, *sizes.values())):
        raise ValueError(
            f"config {str(path)!r} describes no latent diffusion model: it needs model.params with image_size, "
            "channels and first_stage_config.params.ddconfig.ch_mult"
        )
    side = image_size * sizes["factor"]
    defaults = {"description": path.stem, "height": side, "width": side, "steps": 50, "scale": 7.5}
    sampling = config.get("sampling", {})
    if not isinstance(sampling, dict) or not sampling.keys() <= defaults.keys():
        raise ValueError(f"config {str(path)!r}: sampling may hold {', '.join(defaults)}, and holds {sampling}")
    for name, value in sampling.items():
        if not isinstance(value, int | float if name == "scale" else type(defaults[name])):
            raise ValueError(f"config {str(path)!r}: sampling.{name} cannot be {value!r}")
    return sizes | defaults | sampling
