"""Every loader of the project, with a file that it reads."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save

from dsdiff import EmbeddingOptions, ModelOptions, ModelSpec, find_model
from dsdiff.cache_schedule import CacheSchedule
from dsdiff.images.init import read_mask, read_picture
from dsdiff.images.png import read_whole_picture
from dsdiff.images.sets import FilePictures
from dsdiff.jobs import read_prompt_file
from dsdiff.metrics.statistics import Gaussian, read_statistics, write_statistics
from dsdiff.models.bundle import load_bundle, save_bundle
from dsdiff.models.embeddings import read_embedding
from dsdiff.models.float_model import load_float_model
from dsdiff.models.registry import TOKENIZER
from dsdiff.prompt_rows import read_rows
from ldm.checkpoint import read_weights
from ldm.lora import read_lora
from ldm.models.tiny_decoder import read_tiny_decoder
from ldm.modules.diffusionmodules.tiny import TinyDecoder
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.util import instantiate_from_config
from qdiff import QuantConfig, QuantModel
from qdiff.checkpoint import HEADER, CaliHeader, load_cali_ckpt, save_cali_ckpt, split_layers
from tests.fuzz.mutations import without_check_sum

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loader. suffix: of its files. content: a file that it reads. load: reads one. values: the content as plain
    containers and how they are written, for files of text; header: the entry of a .safetensors that holds JSON."""

    name: str
    suffix: str
    content: bytes
    load: Callable[[Path], object]
    values: tuple[Any, Callable[[Any], bytes]] | None = None
    header: str | None = None


def targets(spec: ModelSpec, folder: Path) -> list[Target]:
    """Return all loaders. spec: of a small model; folder: for files that are made on the way."""
    return [*models(spec, folder), *cali_ckpts(folder), *small_files(folder), *pictures(folder), *texts()]


def models(spec: ModelSpec, folder: Path) -> list[Target]:
    config = OmegaConf.to_container(OmegaConf.load(spec.config_path))
    old = io.BytesIO()
    torch.save({"state_dict": read_weights(spec.ckpt)}, old, _use_new_zipfile_serialization=False)
    zipped = io.BytesIO()
    torch.save({"state_dict": read_weights(spec.ckpt), "epoch": 3}, zipped)

    def load(path: Path) -> object:
        return load_float_model(find_model(ModelOptions(config=spec.config_path, ckpt=path)), CPU)

    def load_by(path: Path) -> object:
        return load_float_model(find_model(ModelOptions(config=path, ckpt=spec.ckpt)), CPU)

    return [
        Target(name="checkpoint", suffix=".safetensors", content=without_check_sum(spec.ckpt.read_bytes()), load=load),
        Target(name="checkpoint of torch", suffix=".ckpt", content=zipped.getvalue(), load=load),
        Target(name="checkpoint of old torch", suffix=".ckpt", content=old.getvalue(), load=load),
        Target(
            name="config",
            suffix=".yaml",
            content=spec.config_path.read_bytes(),
            load=load_by,
            values=(config, _yaml),
        ),
        Target(
            name="bundle",
            suffix=".safetensors",
            content=without_check_sum(_bundle(spec, folder / "bundle.safetensors").read_bytes()),
            load=lambda path: load_bundle(path, CPU),
            header=HEADER,
        ),
    ]


def _bundle(spec: ModelSpec, path: Path) -> Path:
    model = load_float_model(spec, CPU)
    config = QuantConfig(weight_bit=4, quant_act=False)
    qnn = QuantModel(model.model.diffusion_model, config)
    qnn.fit_weights()
    model.model.diffusion_model = qnn
    save_bundle(model, spec.config, CaliHeader(config=config, splits=split_layers(qnn)), path)
    return path


def cali_ckpts(folder: Path) -> list[Target]:
    weights = torch.load(GOLDENS / "q_cali_w4a8.pth", weights_only=True)

    def fresh() -> QuantModel:
        unet = instantiate_from_config(OmegaConf.load(GOLDENS / "q_unet.yaml"))
        unet.load_state_dict({name: weights[f"model.{name}"] for name in unet.state_dict()})
        return QuantModel(unet.eval(), QuantConfig())

    qnn, path = fresh(), folder / "cali.safetensors"
    load_cali_ckpt(qnn, GOLDENS / "q_cali_w4a8.pth")
    save_cali_ckpt(qnn, path)
    ours, theirs = without_check_sum(path.read_bytes()), (GOLDENS / "q_cali_w4a8.pth").read_bytes()

    def load(path: Path) -> object:
        return load_cali_ckpt(qnn, path)

    return [
        Target(name="cali_ckpt", suffix=".safetensors", content=ours, load=load, header=HEADER),
        Target(name="cali_ckpt of Q-Diffusion", suffix=".pth", content=theirs, load=load),
    ]


def small_files(folder: Path) -> list[Target]:
    unet = instantiate_from_config(OmegaConf.load(GOLDENS / "q_unet.yaml"))
    layer = "model.diffusion_model.time_embed.0"
    shapes = {layer: tuple(unet.time_embed[0].weight.shape)}
    out, own = shapes[layer]
    lora = {
        "lora_unet_time_embedding_linear_1.lora_down.weight": torch.randn(4, own),
        "lora_unet_time_embedding_linear_1.lora_up.weight": torch.randn(out, 4),
        "lora_unet_time_embedding_linear_1.alpha": torch.tensor(4.0),
    }
    web_ui = io.BytesIO()
    torch.save({"string_to_param": {"*": torch.randn(2, 16)}, "name": "cat"}, web_ui)
    statistics = {}
    for suffix in (".npz", ".safetensors"):
        path = folder / f"statistics{suffix}"
        write_statistics(path, Gaussian(mu=np.zeros(3), sigma=np.eye(3), n=9, facts={"a": 1}))
        statistics[suffix] = path.read_bytes()
    tiny = {f"decoder.{name}": tensor for name, tensor in TinyDecoder(4, 8).state_dict().items()}
    return [
        Target(name="LoRA", suffix=".safetensors", content=save(lora), load=lambda path: read_lora(path, shapes)),
        Target(
            name="embedding",
            suffix=".safetensors",
            content=save({"emb_params": torch.randn(2, 16)}),
            load=lambda path: read_embedding(EmbeddingOptions(path=path)),
        ),
        Target(
            name="embedding of torch",
            suffix=".pt",
            content=web_ui.getvalue(),
            load=lambda path: read_embedding(EmbeddingOptions(path=path)),
        ),
        *(
            Target(name=f"statistics {suffix}", suffix=suffix, content=content, load=read_statistics)
            for suffix, content in statistics.items()
        ),
        Target(name="tiny decoder", suffix=".safetensors", content=save(tiny), load=read_tiny_decoder),
    ]


def pictures(folder: Path) -> list[Target]:
    content = {}
    for form in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        Image.effect_noise((24, 16), 50).convert("RGB").save(file, format=form)
        content[form] = file.getvalue()

    def load(path: Path) -> object:
        read_whole_picture(path, (24, 16))
        return FilePictures("pictures", [path]).picture(0)

    def load_init(path: Path) -> object:
        read_mask(path)
        return read_picture(path)

    return [
        *(Target(name=f"picture {form}", suffix=".png", content=data, load=load) for form, data in content.items()),
        Target(name="init picture", suffix=".png", content=content["PNG"], load=load_init),
    ]


def texts() -> list[Target]:
    row = {"prompt": "a circle", "negative": "blue", "seed": 3, "steps": 4, "scale": 2.5, "size": [64, 32]}
    schedule = {"format": "dsdiff cache schedule 1", "sampler": "ddim", "steps": 8, "guidance": [0, 1], "depth": 1}
    schedule |= {"whole": [0, 3], "error": 0.1, "made": {}}
    tokenizer: Mapping[str, bytes] = {path.name: path.read_bytes() for path in TOKENIZER.iterdir() if path.is_file()}

    def load_tokenizer(name: str) -> Callable[[Path], object]:
        def load(path: Path) -> object:
            folder = path.parent / "tokenizer"
            folder.mkdir(exist_ok=True)
            for each, content in tokenizer.items():
                (folder / each).write_bytes(path.read_bytes() if each == name else content)
            return ClipTokenizer.from_directory(folder).encode("a red circle")

        return load

    found = [
        Target(
            name="prompts",
            suffix=".txt",
            content=b"a red circle\na blue square\n",
            load=lambda path: read_prompt_file(path, "--from-file"),
        ),
        Target(
            name="rows",
            suffix=".jsonl",
            content=_json(row),
            load=lambda path: read_rows(path, "--from-file"),
            values=(row, _json),
        ),
        Target(
            name="schedule of cached steps",
            suffix=".json",
            content=_json(schedule),
            load=CacheSchedule.read,
            values=(schedule, _json),
        ),
    ]
    for name, content in tokenizer.items():
        values = (json.loads(content), _json) if name.endswith(".json") else None
        found.append(Target(name=name, suffix=".bin", content=content, load=load_tokenizer(name), values=values))
    return found


def _json(values: Any) -> bytes:
    return json.dumps(values).encode()


def _yaml(values: Any) -> bytes:
    return yaml.safe_dump(values).encode("utf-8", "surrogatepass")
