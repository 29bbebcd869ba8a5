"""Our UNet, converted for OpenVINO, in floats or in NNCF's 8-bit integers. Models are built and
converted in a worker only (see `worker`).

Conversion takes minutes for a large UNet; its files are kept for the next run. They are of any batch and size. But in
openvino-int8-tome and openvino-bf16-tome half of the tokens are merged, by `tomesd`, and the shapes of one call are
part of the graph. In openvino-int8 all that is not in integers is in bfloat16, as in our int8. Under a cap of the
instruction set that leaves no bfloat16 it is in float32, as OpenVINO does it on such a CPU. Importing this module does
not import the libraries.
"""

import hashlib
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tomesd
from dsdiff.benchmark.options import MERGED_RATIO, MERGING
from dsdiff.benchmark.source import Source
from dsdiff.benchmark.variants import Engine
from ldm.fileio import file_sha256
from qdiff.engine import cpu

FILES = {  # name -> (stem of its file, precision of all that is float)
    "openvino-float32": ("float32", "f32"),
    "openvino-bf16": ("float32", "bf16"),
    "openvino-int8": ("int8", "bf16"),
    "openvino-int8-float32": ("int8", "f32"),
    "openvino-bf16-tome": ("float32-tome", "bf16"),
    "openvino-int8-tome": ("int8-tome", "bf16"),
}
TOKENS = "dsdiff_tokens"  # in an .xml: the share of tokens that the transformer blocks of a merging UNet process


class CompiledUNet(nn.Module):
    """A UNet that OpenVINO runs on the CPU, with as many threads as torch. inputs: of the shapes to come."""

    def __init__(self, xml: Path, precision: str, inputs: Sequence[Tensor]):
        super().__init__()
        self.request, tokens = compiled(xml, precision, [tensor.shape for tensor in inputs])
        self.tokens = float(tokens or 1.0)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        outputs = self.request.infer([tensor.contiguous().numpy() for tensor in (x, timesteps, context)])
        return torch.from_numpy(next(iter(outputs.values())))


def compiled(xml: Path, precision: str, shapes: Sequence[Sequence[int]]) -> tuple[Any, str | None]:
    """Compile a model for inputs of these shapes; return what runs it, and the TOKENS in its file."""
    core = importlib.import_module("openvino").Core()
    model = core.read_model(xml)
    model.reshape({place: list(shape) for place, shape in enumerate(shapes)})
    options = {
        "INFERENCE_PRECISION_HINT": precision if cpu.has_bfloat16() else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    tokens = str(model.get_rt_info(TOKENS).astype(str)) if model.has_rt_info(TOKENS) else None
    return core.compile_model(model, "CPU", options).create_infer_request(), tokens


def build(name: str, source: Source, outdir: Path) -> Engine:
    """Compile a peer from the files that `convert` made in outdir."""
    xml, (_, precision) = file_of(name, source, outdir), FILES[name]
    inputs = source.inputs()
    unet = CompiledUNet(xml, precision, list(inputs.values()))
    size = xml.with_suffix(".bin").stat().st_size
    return Engine(
        unet=unet,
        inputs=inputs,
        weight_bytes=size // 2 if name in ("openvino-bf16", "openvino-bf16-tome") else size,
        device=source.device,
        tokens=unet.tokens,
    )


def file_of(name: str, source: Source, outdir: Path) -> Path:
    """Return the .xml of a peer; its weights lie beside it in a .bin."""
    stem = FILES[name][0]
    if name in MERGING:
        stem += "-" + "x".join(map(str, (source.batch, *source.latents)))
    return folder_of(source, outdir) / f"{stem}.xml"


def folder_of(source: Source, outdir: Path) -> Path:
    """Return the folder of this UNet's files; its name is a hash of all that they depend on."""
    packages = [package for package in ("torch", "openvino", "nncf") if util.find_spec(package) is not None]
    facts = {
        "config": source.unet_config,
        "weights": None if source.ckpt is None else file_sha256(source.ckpt),
        "versions": {package: metadata.version(package) for package in packages},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return outdir / "openvino" / digest[:16]


# --- conversion --------------------------------------------------------------------------------------------


def convert(name: str, source: Source, outdir: Path) -> None:
    """Make the files of a peer, and those that they are made from, where they are not there yet."""
    xml = file_of(name, source, outdir)
    if xml.exists():
        return
    if name in MERGING:
        model = _unet(source, MERGED_RATIO)
        integers = "int8" in name
        save(_quantized(model, source) if integers else model, xml, half=integers)
        return
    float32 = file_of("openvino-float32", source, outdir)
    if not float32.exists():
        save(_unet(source), float32)
    if not xml.exists():
        save(_quantized(importlib.import_module("openvino").Core().read_model(float32), source), xml, half=True)


def _unet(source: Source, ratio: float = 0.0) -> Any:
    """Convert the UNet, and in it the merging of this share of the tokens."""
    unet, inputs = source.unet(), tuple(source.inputs().values())
    if not ratio:
        return converted(unet, inputs)
    tomesd.apply_patch(unet, ratio=ratio)
    with tomesd.pinned(unet, 0), torch.no_grad():
        unet(*inputs)  # draws the destinations: the same ones in each call of the converted UNet
        model = converted(unet, inputs)
    counts = tomesd.token_report(unet)
    tokens = sum(count.tokens_processed for count in counts) / sum(count.tokens_in for count in counts)
    model.set_rt_info(str(tokens), TOKENS)
    return model


def converted(network: nn.Module | torch.export.ExportedProgram, inputs: Sequence[Tensor]) -> Any:
    """Convert a network, which is traced with these inputs unless it was exported before."""
    ov = importlib.import_module("openvino")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tracing
        if isinstance(network, nn.Module):
            return ov.convert_model(network, example_input=tuple(inputs))
        return ov.convert_model(network)


def _quantized(model: Any, source: Source) -> Any:
    """Quantize a converted UNet with NNCF."""
    nncf = importlib.import_module("nncf")
    logging.getLogger("nncf").setLevel(logging.WARNING)
    sample = [tensor.numpy() for tensor in source.inputs().values()]
    return nncf.quantize(
        model,
        nncf.Dataset([sample]),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=1,
    )


def save(model: Any, xml: Path, *, half: bool = False) -> None:
    """Write both files of a model, complete or not at all: the .xml is put in its place last. half: floats take 16
    bits in the file."""
    xml.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=xml.parent) as temporary:
        importlib.import_module("openvino").save_model(model, Path(temporary) / xml.name, compress_to_fp16=half)
        for path in (xml.with_suffix(".bin"), xml):
            (Path(temporary) / path.name).replace(path)
