"""Settings of a LoRA outside of its tensors: peft's config, in a file beside it or in diffusers' header."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import read_metadata
from ldm.fileio import json_object

logger = logging.getLogger(__name__)

DIFFUSERS_METADATA = "lora_adapter_metadata"  # the entry of a safetensors header in which diffusers keeps peft's config
PEFT_CONFIG = "adapter_config.json"  # beside a file of peft
PEFT_PREFIX = "base_model.model."
LARGEST = 1e30  # no alpha is so large

# Settings of peft that make more of an adapter than a LoRA: (setting, is it harmless?, the words for the message).
PEFT_SETTINGS: Sequence[tuple[str, Callable[[Any], bool], str]] = (
    ("peft_type", lambda value: value in (None, "LORA"), "another method of peft than LoRA"),
    ("use_dora", lambda value: not value, "a DoRA"),
    ("bias", lambda value: value in (None, "none"), "trained biases"),
    ("lora_bias", lambda value: not value, "factors with biases"),
    ("fan_in_fan_out", lambda value: not value, "transposed weights"),
    ("modules_to_save", lambda value: not value, "whole layers beside the LoRA"),
    (
        "init_lora_weights",
        lambda value: not str(value).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
        "factors that belong to base weights of their own (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)",
    ),
    *(
        (name, lambda value: not value, "a variant of LoRA")
        for name in ("use_qalora", "use_bdlora", "layer_replication", "target_parameters", "alora_invocation_tokens")
    ),
)


class PeftSettings:
    """The config of peft, beside a file or in diffusers' header: alpha where no tensor tells it.

    configs: the config by the prefix of the names that it is for. source: the file, for messages.
    Raises ValueError for a config of something else than a LoRA, and for one that cannot be read.
    """

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], source: str):
        self.configs, self.source, self.warned = configs, source, False
        for config in configs.values():
            for name, is_harmless, what in PEFT_SETTINGS:
                if name in config and not is_harmless(config[name]):
                    raise ValueError(f"LoRA {source} is not supported: {name} {config[name]!r} means {what}")
            patterns = config.get("alpha_pattern") or {}
            if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", name) for name in patterns):
                raise ValueError(f"LoRA {source} is not supported: its alpha_pattern is {patterns!r:.80}")

    @classmethod
    def read(cls, path: Path, keys: Iterable[str]) -> "PeftSettings":
        """Return the settings of a file that has these keys."""
        source, text, beside = repr(str(path)), read_metadata(path).get(DIFFUSERS_METADATA), path.with_name(PEFT_CONFIG)
        if text is not None:
            flat = _json(text, f"the header of LoRA {source}")
            configs = {prefix: _below(prefix, flat) for prefix in ("unet.", "text_encoder.")}
            return cls(configs if any(configs.values()) else {"": flat}, source)  # the latter of a UNet by itself
        if beside.is_file() and any(key.startswith(PEFT_PREFIX) for key in keys):
            return cls({PEFT_PREFIX: _json(beside.read_text("utf-8", "replace"), repr(str(beside)))}, source)
        return cls({}, source)

    def strength(self, key: str, rank: int, alpha: Tensor | None) -> float:
        """Return alpha / rank of a layer (alpha / sqrt(rank) where the config says so); 1 if nothing tells alpha."""
        if alpha is not None:
            return float(alpha) / rank
        for prefix, config in self.configs.items():
            if key.startswith(prefix) and "lora_alpha" in config:
                value = _alpha(config, key.removeprefix(prefix))
                if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
                    raise ValueError(f"LoRA {self.source}: alpha of {key} is {value!r:.20}, no finite number")
                return value / math.sqrt(rank) if config.get("use_rslora") else value / rank
        if key.startswith(PEFT_PREFIX) and not self.warned:
            self.warned = True
            logger.warning("LoRA %s: no %s lies beside it, so alpha is taken to be the rank", self.source, PEFT_CONFIG)
        return 1.0


def _alpha(config: Mapping[str, Any], name: str) -> Any:
    """Return alpha of a layer: its entry in alpha_pattern, whose keys are ends of names, or lora_alpha."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        whole = pattern.removeprefix("^")
        if name == whole or (whole == pattern and name.endswith("." + pattern)):
            return value
    return config["lora_alpha"]


def _below(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def _json(text: str, source: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}") from error
