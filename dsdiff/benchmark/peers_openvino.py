"""Our UNet, converted for OpenVINO, in floats or in NNCF's 8-bit integers. Models are built and
converted in a worker only (see `worker`).

Conversion takes minutes for a large UNet; its files are kept for the next run. In openvino-int8 all that is not in
integers is in bfloat16, as in our int8. Importing this module does not import the libraries.
"""

import hashlib
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsdiff.benchmark.source import Source
from dsdiff.benchmark.variants import Engine
from ldm.fileio import file_sha256

FILES = {  # name -> (stem of its file, precision of all that is float)
    "openvino-float32": ("float32", "f32"),
    "openvino-bf16": ("float32", "bf16"),
    "openvino-int8": ("int8", "bf16"),
    "openvino-int8-float32": ("int8", "f32"),
}


class CompiledUNet(nn.Module):
    """A UNet that OpenVINO runs on the CPU, with as many threads as torch. inputs: of the shapes to come."""

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


def build(name: str, source: Source, outdir: Path) -> Engine:
    """Compile a peer from the files that `convert` made in outdir."""
    xml, (_, precision) = file_of(name, source, outdir), FILES[name]
    inputs = source.inputs()
    size = xml.with_suffix(".bin").stat().st_size
    return Engine(
        unet=CompiledUNet(xml, precision, list(inputs.values())),
        inputs=inputs,
        weight_bytes=size // 2 if name == "openvino-bf16" else size,
        device=source.device,
    )


def file_of(name: str, source: Source, outdir: Path) -> Path:
    """Return the .xml of a peer; its weights lie beside it in a .bin."""
    return folder_of(source, outdir) / f"{FILES[name][0]}.xml"


def folder_of(source: Source, outdir: Path) -> Path:
    """Return the folder of this UNet's files; its name is a hash of all that they depend on."""
    packages = [package for package in ("torch", "openvino", "nncf") if util.find_spec(package) is not None]
    facts = {
        "config": source.unet_config,
        "weights": None if source.ckpt is None else file_sha256(source.ckpt),
        "inputs": {name: list(tensor.shape) for name, tensor in source.inputs().items()},
        "versions": {package: metadata.version(package) for package in packages},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return outdir / "openvino" / digest[:16]


# --- conversion --------------------------------------------------------------------------------------------


def convert(name: str, source: Source, outdir: Path) -> None:
    """Make the files of a peer, and those that they are made from, where they are not there yet."""
    float32, xml = (file_of(each, source, outdir) for each in ("openvino-float32", name))
    if not float32.exists():
        _save(_converted(source), float32)
    if not xml.exists():
        _save(_quantized(float32, source), xml)


def _converted(source: Source) -> Callable[[Path], Any]:
    """Convert the UNet; return what saves it."""
    ov = importlib.import_module("openvino")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tracing
        model = ov.convert_model(source.unet(), example_input=tuple(source.inputs().values()))
    return lambda path: ov.save_model(model, path, compress_to_fp16=False)


def _quantized(xml: Path, source: Source) -> Callable[[Path], Any]:
    """Quantize the converted UNet with NNCF; return what saves it."""
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


def _save(save: Callable[[Path], Any], xml: Path) -> None:
    """Write both files of a model, complete or not at all: the .xml is put in its place last."""
    xml.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=xml.parent) as temporary:
        save(Path(temporary) / xml.name)
        for path in (xml.with_suffix(".bin"), xml):
            (Path(temporary) / path.name).replace(path)
