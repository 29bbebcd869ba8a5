"""A model before its weights are read: its files, its sizes, and its defaults for sampling."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsdiff.models.configs import config_for_drawing, look_up, read_config
from dsdiff.models.registry import CALI_CKPTS, CALI_PROMPTS_NAME, CHECKPOINTS, OTHER_CALI_CKPTS, STABLE_DIFFUSION
from dsdiff.options import ModelOptions
from ldm.messages import brief

# The prediction in a file's header, by the names of the modelspec standard -> `parameterization` of a config.
PREDICTION_TYPES = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v"}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's files and facts.

    config: the whole config, plain. ckpt: the file of the weights, or a folder of diffusers. vae_ckpt: the file or
    folder of another autoencoder. description: the model in words. height, width: of its pictures, in pixels. steps,
    scale: its defaults of sampling. channels: of the latents. factor: pixels per latent. timesteps: of the noise
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
    vae_ckpt: Path | None = None

    def __str__(self) -> str:
        autoencoder = "" if self.vae_ckpt is None else f", autoencoder of {self.vae_ckpt}"
        return f"{self.description} ({self.ckpt}{autoencoder})"

    @property
    def embeds_guidance(self) -> bool:
        """True if the UNet takes the scale of guidance as an input, as full LCM checkpoints do."""
        return look_up(self.config, "model.params.unet_config.params.time_cond_proj_dim") is not None

    @property
    def prompt_room(self) -> int:
        """How many tokens of a prompt the text encoder sees at once, without start and end: 75 in Stable Diffusion."""
        return (look_up(self.config, "model.params.cond_stage_config.params.max_length") or 77) - 2

    @property
    def output_blocks(self) -> int:
        """How many output blocks the UNet has, and as many input blocks. Raises ValueError without sizes of one."""
        unet = look_up(self.config, "model.params.unet_config.params") or {}
        levels, blocks = unet.get("channel_mult", (1, 2, 4, 8)), unet.get("num_res_blocks")
        if not isinstance(levels, list | tuple) or not isinstance(blocks, int):
            raise ValueError(f"config {str(self.config_path)!r} has no UNet with channel_mult and num_res_blocks")
        return len(levels) * (blocks + 1)

    @property
    def cali_ckpts(self) -> Mapping[int, Path]:
        """The cali_ckpts that come with the checkpoint, by the bits of its weights."""
        return CALI_CKPTS.get(self.ckpt.resolve(), {})

    @property
    def named_cali_ckpts(self) -> Mapping[str, Path]:
        """All cali_ckpts that come with the checkpoint, by what they are in words: W4A8, say."""
        by_bits = {f"W{bits}A8": path for bits, path in sorted(self.cali_ckpts.items())}
        return {**by_bits, **OTHER_CALI_CKPTS.get(self.ckpt.resolve(), {})}

    @property
    def name(self) -> str:
        """The model's name for records: that of the file without its ending, or of the folder of diffusers."""
        return self.description if self.ckpt.is_dir() else self.ckpt.stem

    @property
    def cali_prompts(self) -> Path | None:
        """The prompts for calibration data, beside the config; a folder of diffusers has Stable Diffusion's. None if
        there are none, as for a bundle, which is calibrated."""
        if self.bundle:
            return None
        config = STABLE_DIFFUSION if self.ckpt.is_dir() else self.config_path
        path = config.parent / CALI_PROMPTS_NAME
        return path if path.is_file() else None

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weights, and of what drawing needs of the config, wherever its tokenizer lies.

        That of a folder is the hash of the hashes of its files of weights.
        """
        from ldm.diffusers_folder import files_read

        architecture = yaml.safe_dump(config_for_drawing(self.config)).encode()
        vae = {} if self.vae_ckpt is None else {"vae_sha256": _joint_sha256(files_read(self.vae_ckpt, ("vae",)))}
        return {
            "ckpt_sha256": _joint_sha256(files_read(self.ckpt)),
            "config_sha256": hashlib.sha256(architecture).hexdigest(),
            **vae,
        }


def _joint_sha256(files: Sequence[Path]) -> str:
    from ldm.fileio import file_sha256

    hashes = [file_sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def find_model(options: ModelOptions, *, accept_bundle: bool = True) -> ModelSpec:
    """Return the model that the options mean. Reads the config, and of the checkpoint no more than its header.

    Raises FileNotFoundError or ValueError for files that are missing or no model's, and ValueError for a bundle where a
    float model is needed or another option contradicts it.
    """
    from dsdiff.models.hub import from_hub

    bundled = _bundled_config(options, accept_bundle)
    if bundled is not None:
        assert options.ckpt is not None, "only a checkpoint can be a bundle"
        return ModelSpec(
            config_path=options.ckpt, config=bundled, ckpt=options.ckpt, bundle=True, **_facts(bundled, options.ckpt)
        )
    vae_ckpt = None if options.vae_ckpt is None else from_hub(options.vae_ckpt, ("vae",))
    if vae_ckpt is not None and not vae_ckpt.exists():
        raise FileNotFoundError(f"no autoencoder at {str(vae_ckpt)!r}: give its path with --vae_ckpt")
    folder = None if options.ckpt is None else from_hub(options.ckpt)
    if folder is not None and folder.is_dir():
        config, config_path, ckpt = _folder_config(folder, options), folder, folder
    else:
        config_path, ckpt = _choose_files(options.config, options.ckpt)
        if not ckpt.exists():
            raise FileNotFoundError(f"no checkpoint at {str(ckpt)!r}: give its path with --ckpt")
        config = _with_prediction(read_config(config_path), ckpt)
    return ModelSpec(
        config_path=config_path, config=config, ckpt=ckpt, vae_ckpt=vae_ckpt, **_facts(config, config_path)
    )


def _folder_config(folder: Path, options: ModelOptions) -> dict[str, Any]:
    """Return the config of a folder of diffusers."""
    from ldm.diffusers_config import config_of_folder
    from ldm.diffusers_folder import is_diffusers_folder

    if not is_diffusers_folder(folder):
        raise ValueError(f"{str(folder)!r} is not a file, and no folder as diffusers saves it: give one with --ckpt")
    if options.config is not None:
        raise ValueError(f"--config has no effect: {str(folder)!r} brings its own; leave it out")
    given = options.ckpt or folder  # a hub id stays the model's name
    return config_of_folder(folder, folder.resolve().name if given == folder else given.as_posix())


def _with_prediction(config: dict[str, Any], ckpt: Path) -> dict[str, Any]:
    """Return the config with the prediction that the file's header or the yaml beside it names, if any.

    Of a yaml of the checkpoint's name, nothing else is read. A config that says what the UNet predicts is left alone.
    """
    from ldm.weight_files import has_mark, read_metadata

    params = look_up(config, "model.params")
    if not isinstance(params, dict) or "parameterization" in params:
        return config
    try:
        marked = {name: has_mark(ckpt, name) for name in ("v_pred", "ztsnr")}
        named = read_metadata(ckpt).get("modelspec.prediction_type", "v" if marked["v_pred"] else "epsilon")
    except ValueError:  # loading the file will tell why
        return config
    if named not in PREDICTION_TYPES:
        raise ValueError(f"{str(ckpt)!r} predicts {named!r} by its header: only epsilon and v are supported")
    beside = ckpt.with_suffix(".yaml")
    own = look_up(read_config(beside), "model.params.parameterization") if beside.is_file() else None
    prediction = {"parameterization": own or PREDICTION_TYPES[named]}
    if prediction["parameterization"] == "eps":
        return config
    schedule = {"rescale_betas_zero_snr": True} if marked["ztsnr"] else {}
    return {**config, "model": {**config["model"], "params": {**params, **prediction, **schedule}}}


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
    for name in ("config", "tokenizer", "vae_ckpt"):
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
        held = brief(sampling)
        raise ValueError(f"config {str(path)!r}: sampling may hold {', '.join(defaults)}, and holds {held}")
    for name, value in sampling.items():
        if not isinstance(value, int | float if name == "scale" else type(defaults[name])):
            raise ValueError(f"config {str(path)!r}: sampling.{name} cannot be {value!r}")
    return sizes | defaults | sampling
