"""Configs: CompVis's yaml files, read as plain dicts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsdiff.models.registry import ROOT


def read_config(path: Path) -> dict[str, Any]:
    """Read a config as plain dicts. A relative tokenizer directory in it is found wherever the command runs.

    Raises OSError if the file cannot be read, ValueError if it is no yaml, or no settings by name.
    """
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"config {str(path)!r} is no valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config {str(path)!r} holds a {type(config).__name__}: it must hold settings by name")
    encoder = look_up(config, "model.params.cond_stage_config.params")
    if isinstance(encoder, dict) and encoder.get("tokenizer"):
        directory = encoder.pop("tokenizer")
        found = [place / directory for place in (Path.cwd(), ROOT) if (place / directory).is_dir()]
        if found:  # otherwise it may lie beside the checkpoint
            encoder["tokenizer"] = str(found[0])
    return config


def config_for_drawing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what drawing needs of a config: nothing of training, and no directory."""
    config = json.loads(json.dumps({name: config[name] for name in ("model", "sampling") if name in config}))
    params = config["model"]["params"]
    params.pop("scheduler_config", None)
    encoder = params.get("cond_stage_config") or {}
    (encoder.get("params") or {}).pop("tokenizer", None)
    return dict(config)


def look_up(config: Any, path: str) -> Any:
    """Return the value at a dotted path; None where there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config
