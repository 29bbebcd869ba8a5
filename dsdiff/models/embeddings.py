"""Embeddings of textual inversion (Gal et al., arXiv:2208.01618): files of vectors that a word in prompts stands for.

Three layouts are read, without running code of a file: that of stable-diffusion-webui (.pt, "string_to_param"), the
same as .safetensors ("emb_params"), and diffusers' (.bin, .pt or .safetensors: one token and its vectors).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import safe_globals

from dsdiff.models.configs import look_up
from dsdiff.models.spec import ModelSpec
from dsdiff.options import EmbeddingOptions
from ldm.fileio import file_sha256
from ldm.messages import first_line
from ldm.modules.encoders.clip import ClipTextConfig

WEB_UI, WEB_UI_SAFE = "string_to_param", "emb_params"
OTHERS = frozenset({"clip_l", "clip_g"})  # of Stable Diffusion XL, which has two text encoders


@dataclass(frozen=True, kw_only=True)
class EmbeddingRecord:
    """An embedding as settings record it: its word in prompts, the SHA-256 of its file, and how many vectors it has."""

    name: str
    sha256: str
    vectors: int

    def __str__(self) -> str:
        return f"{self.name}: {self.sha256[:12]}"


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The embeddings of a pipeline. records: one each, in the order given. vectors: float32 [n, C] by name."""

    records: tuple[EmbeddingRecord, ...]
    vectors: Mapping[str, Tensor]


def read_embeddings(options: Sequence[EmbeddingOptions], spec: ModelSpec) -> Embeddings:
    """Read embeddings for a model.

    Raises FileNotFoundError for a missing file; ValueError for one that is no embedding, whose vectors have another
    width than the model's text encoder or more than fit into a prompt, and for a name that comes twice.
    """
    vectors: dict[str, Tensor] = {}
    records = []
    for each in options:
        name, rows = read_embedding(each)
        width = _text_width(spec)
        if width is not None and rows.shape[1] != width:
            raise ValueError(
                f"embedding {str(each.path)!r} has vectors of width {rows.shape[1]}, the model's text encoder has "
                f"{width}: it is of another model"
            )
        if len(rows) > spec.prompt_room:
            raise ValueError(
                f"embedding {str(each.path)!r} has {len(rows)} vectors: a prompt of this model has room for "
                f"{spec.prompt_room}"
            )
        if name.lower() in (known.lower() for known in vectors):
            raise ValueError(f"two embeddings are called {name!r}: give one another name, {each.path}:NAME")
        vectors[name] = rows
        records.append(EmbeddingRecord(name=name, sha256=file_sha256(each.path), vectors=len(rows)))
    return Embeddings(records=tuple(records), vectors=vectors)


def read_embedding(options: EmbeddingOptions) -> tuple[str, Tensor]:
    """Return the name and the vectors of an embedding, float32 [n, C]. Raises FileNotFoundError or ValueError."""
    path = options.path
    if not path.is_file():
        missing = "is a folder: give the file in it" if path.is_dir() else "is not there"
        raise FileNotFoundError(f"embedding {str(path)!r} {missing}")
    token, rows = _vectors(_content(path), path)
    rows = (rows[None] if rows.ndim == 1 else rows).detach().float()
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(f"embedding {str(path)!r} holds {tuple(rows.shape)} numbers, which are no vectors")
    if not rows.isfinite().all():
        raise ValueError(f"embedding {str(path)!r} holds NaN or infinite values")
    return EmbeddingOptions(path=path, name=options.name or token or path.stem).name or "", rows


def _content(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with safe_globals([nn.ParameterDict, nn.Parameter]):  # in files of the first implementation
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"embedding {str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # the unpickler raises many types
        line = first_line(error)
        raise ValueError(f"embedding {str(path)!r} is damaged, or holds more than vectors: {line}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"embedding {str(path)!r} holds a {type(content).__name__}, not named vectors")
    return content


def _vectors(content: Mapping[str, Any], path: Path) -> tuple[str | None, Tensor]:
    """Return the token that a file in diffusers' layout names, None for others, and its vectors."""
    if OTHERS & content.keys():
        raise ValueError(f"embedding {str(path)!r} is one of Stable Diffusion XL, which is another model")
    if WEB_UI_SAFE in content:
        return None, content[WEB_UI_SAFE]
    of_web_ui = WEB_UI in content
    found: Any = content[WEB_UI] if of_web_ui else content
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if len(tensors) != 1:
        raise ValueError(f"embedding {str(path)!r} has {len(tensors)} entries with vectors: it must have one")
    ((token, rows),) = tensors.items()
    return (None if of_web_ui else token), rows


def _text_width(spec: ModelSpec) -> int | None:
    """Return the width of the model's text encoder as its config tells it; None for an encoder of another kind."""
    stage = look_up(spec.config, "model.params.cond_stage_config") or {}
    if not str(stage.get("target", "")).endswith(".FrozenCLIPEmbedder"):
        return None
    given = look_up(stage, "params.text_config") or {}
    return int(given.get("hidden_size", ClipTextConfig().hidden_size))
