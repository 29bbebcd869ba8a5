"""What others make of the same UNet, where it is installed: diffusers, and OpenVINO with NNCF's 8-bit integers.

diffusers gets a UNet of the same sizes with weights of its own. OpenVINO gets ours, converted; that takes minutes for a
large one, and is kept for the next run. openvino-int8 computes what is not in integers in bfloat16, as our int8 does.
"""

import functools
import hashlib
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsdiff.benchmark.source import Source
from dsdiff.benchmark.variants import FLOAT, Engine, float_engine
from ldm.fileio import file_sha256

DIFFUSERS = {f"diffusers-{name}": dtype for name, dtype in FLOAT.items()}
OPENVINO = {  # name -> (file, precision of what is float)
    "openvino-float32": ("float32", "f32"),
    "openvino-bf16": ("float32", "bf16"),
    "openvino-int8": ("int8", "bf16"),
    "openvino-int8-float32": ("int8", "f32"),
}
PEERS = (*DIFFUSERS, *OPENVINO)


def needs(name: str) -> tuple[str, ...]:
    """The packages of a peer."""
    if name in DIFFUSERS:
        return ("diffusers",)
    return ("openvino", "nncf") if OPENVINO[name][0] == "int8" else ("openvino",)


def choose_peers(wanted: Sequence[str], source: Source) -> tuple[list[str], dict[str, str]]:
    """Those that can be measured here, and of the others the reasons."""
    reasons = {name: reason for name in wanted if (reason := why_not(name, source))}
    return [name for name in dict.fromkeys(wanted) if name not in reasons], reasons


def why_not(name: str, source: Source) -> str | None:
    """Why a peer cannot be measured; None if it can."""
    missing = [package for package in needs(name) if util.find_spec(package) is None]
    if missing:
        return f"not installed: pip install {' '.join(missing)}"
    if name in OPENVINO and source.device.type != "cpu":
        return "it is measured on the CPU alone: use --device cpu"
    return unlike(source) if name in DIFFUSERS else None


def build(name: str, source: Source, outdir: Path) -> Engine:
    """A peer. outdir: that of `convert`, which comes before."""
    if name in DIFFUSERS:
        return diffusers_engine(source, DIFFUSERS[name])
    file, precision = OPENVINO[name]
    return openvino_engine(source, folder_of(source, outdir) / f"{file}.xml", precision)


# --- diffusers ---------------------------------------------------------------------------------------------


def unlike(source: Source) -> str | None:
    """Why diffusers has no UNet like this one; None if it has."""
    try:
        with torch.device("meta"):
            theirs = sum(parameter.numel() for parameter in diffusers_unet(source.unet_config["params"]).parameters())
    except (ValueError, KeyError) as error:
        return f"its UNet cannot have these sizes: {error}"
    ours = source.parameters()
    return None if theirs == ours else f"its UNet of these sizes has {theirs} parameters, in place of {ours}"


def diffusers_engine(source: Source, dtype: torch.dtype) -> Engine:
    unet = diffusers_unet(source.unet_config["params"])
    x, timesteps, context = source.inputs().values()
    inputs = {"sample": x, "timestep": timesteps, "encoder_hidden_states": context, "return_dict": False}
    return float_engine(unet.to(source.device).eval(), inputs, dtype)


def diffusers_unet(params: Mapping[str, Any]) -> nn.Module:
    """A UNet2DConditionModel of the sizes of a UNetModel."""
    diffusers, mult = importlib.import_module("diffusers"), params["channel_mult"]
    diffusers.utils.logging.set_verbosity_error()  # it warns of every change of dtype
    attends = [2**level in params["attention_resolutions"] for level in range(len(mult))]
    down, up = ([f"CrossAttn{way}Block2D" if on else f"{way}Block2D" for on in attends] for way in ("Down", "Up"))
    with torch.random.fork_rng(devices=[]):
        return diffusers.UNet2DConditionModel(
            in_channels=params["in_channels"],
            out_channels=params["out_channels"],
            block_out_channels=tuple(params["model_channels"] * factor for factor in mult),
            layers_per_block=params["num_res_blocks"],
            down_block_types=tuple(down),
            up_block_types=tuple(reversed(up)),
            cross_attention_dim=params["context_dim"],
            attention_head_dim=params["num_heads"],  # diffusers' name for it
            norm_num_groups=params.get("norm_groups", 32),
        )


# --- OpenVINO ----------------------------------------------------------------------------------------------


class CompiledUNet(nn.Module):
    """A UNet that OpenVINO runs."""

    def __init__(self, xml: Path, precision: str, inputs: Sequence[Tensor]):
        super().__init__()
        core = importlib.import_module("openvino").Core()
        model = core.read_model(xml)
        model.reshape({place: list(tensor.shape) for place, tensor in enumerate(inputs)})
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.request = core.compile_model(model, "CPU", options).create_infer_request()

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        outputs = self.request.infer([tensor.contiguous().numpy() for tensor in (x, timesteps, context)])
        return torch.from_numpy(next(iter(outputs.values())))


def openvino_engine(source: Source, xml: Path, precision: str) -> Engine:
    inputs = source.inputs()
    size = xml.with_suffix(".bin").stat().st_size
    return Engine(
        unet=CompiledUNet(xml, precision, list(inputs.values())),
        inputs=inputs,
        weight_bytes=size // 2 if (xml.stem, precision) == ("float32", "bf16") else size,
        device=source.device,
    )


def folder_of(source: Source, outdir: Path) -> Path:
    """Where OpenVINO's files of this UNet lie: a name for all on which they depend."""
    packages = [package for package in ("torch", "openvino", "nncf") if util.find_spec(package) is not None]
    facts = {
        "config": source.unet_config,
        "weights": None if source.ckpt is None else sha256(source.ckpt),
        "inputs": {name: list(tensor.shape) for name, tensor in source.inputs().items()},
        "versions": {package: metadata.version(package) for package in packages},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return outdir / "openvino" / digest[:16]


sha256 = functools.cache(file_sha256)  # of a large file it takes a while


def convert(names: Sequence[str], source: Source, outdir: Path) -> None:
    """Make the files that these engines need and that are not there yet."""
    files = {OPENVINO[name][0] for name in names if name in OPENVINO}
    if not files:
        return
    float32, int8 = (folder_of(source, outdir) / f"{name}.xml" for name in ("float32", "int8"))
    if not float32.exists():
        _save(_converted(source), float32)
    if "int8" in files and not int8.exists():
        _save(_quantized(float32, source), int8)


def _converted(source: Source) -> Callable[[Path], None]:
    ov = importlib.import_module("openvino")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tracing
        model = ov.convert_model(source.unet(), example_input=tuple(source.inputs().values()))
    return lambda path: ov.save_model(model, path, compress_to_fp16=False)


def _quantized(xml: Path, source: Source) -> Callable[[Path], None]:
    ov, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    logging.getLogger("nncf").setLevel(logging.WARNING)
    sample = [tensor.numpy() for tensor in source.inputs().values()]
    model = nncf.quantize(
        ov.Core().read_model(xml),
        nncf.Dataset([sample]),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=1,
    )
    return lambda path: ov.save_model(model, path)


def _save(save: Callable[[Path], None], xml: Path) -> None:
    """Both files of a model, complete or not there: the .xml comes last."""
    xml.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=xml.parent) as temporary:
        save(Path(temporary) / xml.name)
        for path in (xml.with_suffix(".bin"), xml):
            (Path(temporary) / path.name).replace(path)
