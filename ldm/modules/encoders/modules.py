"""Prompts to context vectors: the frozen text tower of CLIP (Radford et al. 2021), as Stable Diffusion v1 uses it."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.modules.encoders.tokenizer import FILES_WANTED, TokenizerSource, has_tokenizer_files

logger = logging.getLogger(__name__)

VIT_L_14 = "openai/clip-vit-large-patch14"
VIT_L_14_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class FrozenCLIPEmbedder(nn.Module):
    """CLIP's text tower with its tokenizer: prompts -> [B, max_length, hidden_size].

    version: name of the CLIP model. ViT-L/14 is known here; any other needs `text_config`. The hub is asked for its
        tokenizer only under a name with an owner ("owner/name").
    device: where the weights are built (None: the current default device); nothing is downloaded, they come
        from the checkpoint.
    max_length: tokens per prompt, start and end included; at most the tower's max_position_embeddings.
    text_config: fields of transformers' CLIPTextConfig that replace those of ViT-L/14.
    tokenizer: directory of the tokenizer's files, see `set_tokenizer`.
    trainable: leave the weights trainable; otherwise the module is frozen and stays in eval mode.

    The state_dict has the names of 2022 (`transformer.text_model...`, `...embeddings.position_ids` included)
    whatever the release of transformers; today's names, with no `text_model.`, are accepted too.
    Raises ValueError for an unknown version, an unknown field of text_config or a max_length out of range.
    """

    def __init__(
        self,
        version: str = VIT_L_14,
        device: str | torch.device | None = None,
        max_length: int = 77,
        *,
        text_config: Mapping[str, Any] | None = None,
        tokenizer: str | Path | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        config = _text_config(version, text_config)
        if not 2 <= max_length <= config.max_position_embeddings:
            raise ValueError(f"max_length {max_length} must lie in 2..{config.max_position_embeddings}")
        self.max_length = max_length
        self.trainable = trainable
        # A plain name is nobody's repository, and ViT-L/14 with other sizes is not the one on the hub.
        known_on_hub = "/" in version and (text_config is None or version != VIT_L_14)
        self.tokenizer_source = TokenizerSource(hub_name=version if known_on_hub else None)
        self._tokenizer: CLIPTokenizer | None = None
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)
        self._reported: set[str] = set()
        with torch.device(device if device is not None else torch.get_default_device()):
            self.transformer = _text_tower(config)
        self.register_load_state_dict_pre_hook(_accept_other_names)
        if not trainable:
            self.freeze()

    def freeze(self) -> None:
        """No gradients for the weights, and eval mode from now on."""
        self.trainable = False
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenCLIPEmbedder":
        return super().train(mode and self.trainable)

    def set_tokenizer(self, directory: str | Path) -> None:
        """Take the tokenizer from `directory` (vocab.json and merges.txt, or tokenizer.json) and nowhere else.

        Raises FileNotFoundError when the directory lacks those files.
        """
        if not has_tokenizer_files(directory):
            raise FileNotFoundError(f"no tokenizer in {str(directory)!r}: it must hold {FILES_WANTED}")
        self.tokenizer_source.directory = Path(directory)
        self._tokenizer = None

    def set_tokenizer_candidates(self, directories: Iterable[str | Path]) -> None:
        """Where to look, in this order and before the hub, unless `set_tokenizer` decided it."""
        self.tokenizer_source.candidates = tuple(map(Path, directories))
        self._tokenizer = None

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer, found at first use.

        Raises FileNotFoundError, which says what to put where; ValueError when it is another model's.
        """
        if self._tokenizer is None:
            tokenizer, origin = self.tokenizer_source.load()
            known = self.transformer.text_model.config.vocab_size
            if len(tokenizer) > known:
                raise ValueError(
                    f"the tokenizer in {str(origin)!r} has {len(tokenizer)} tokens, the text model {known}"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, max_length]: start, text, end, padding. A longer prompt is cut, with a warning (once)."""
        return torch.tensor([self._token_ids(prompt) for prompt in prompts], dtype=torch.long)

    def _token_ids(self, prompt: str) -> list[int]:
        tokenizer = self.tokenizer
        ids = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        if len(ids) > self.max_length:
            cut = ids[self.max_length - 1 : -1]
            ids = [*ids[: self.max_length - 1], ids[-1]]
            self._report_cut(prompt, tokenizer.decode(cut))
        return ids + [tokenizer.pad_token_id] * (self.max_length - len(ids))

    def _report_cut(self, prompt: str, cut: str) -> None:
        if prompt not in self._reported:
            self._reported.add(prompt)
            logger.warning("prompt longer than %d tokens, its end is not seen: %r", self.max_length, cut)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts [B] -> the tower's last hidden states after the final norm [B, max_length, hidden_size]."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"a list of prompts is expected, got {prompts!r}")
        device = next(self.transformer.parameters()).device
        return self.transformer(self.tokenize(prompts).to(device))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The same as calling the module."""
        return self(prompts)


class _TextTower(nn.Module):
    """Holds the model under the name `text_model`, which current releases of transformers no longer have."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_model(input_ids=input_ids).last_hidden_state


def _text_tower(config: CLIPTextConfig) -> _TextTower:
    model = CLIPTextModel(config)
    model = getattr(model, "text_model", model)
    # Persistent, as it was in 2022: in the state_dict, and so filled by whatever fills the weights.
    model.embeddings.register_buffer("position_ids", _position_ids(config.max_position_embeddings))
    return _TextTower(model)


def _position_ids(length: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(length, device=device)[None]


def _text_config(version: str, given: Mapping[str, Any] | None) -> CLIPTextConfig:
    if given is None and version != VIT_L_14:
        raise ValueError(f"the sizes of {version!r} are not known here: give text_config, or version {VIT_L_14!r}")
    fields = VIT_L_14_TEXT | {str(key): given[key] for key in given or {}}
    unknown = sorted(set(fields) - set(CLIPTextConfig().to_dict()))
    if unknown:
        raise ValueError(f"text_config has no field {', '.join(map(repr, unknown))}")
    # CLIP's vocabularies end with <|startoftext|>, <|endoftext|>; the latter also pads.
    start, end = fields["vocab_size"] - 2, fields["vocab_size"] - 1
    return CLIPTextConfig(**{"bos_token_id": start, "eos_token_id": end, "pad_token_id": end} | fields)


def _accept_other_names(module: FrozenCLIPEmbedder, state_dict: dict[str, Tensor], prefix: str, *_unused: Any) -> None:
    """Before loading: add `text_model.` to today's names, and replace the position ids by what they must be.

    They are absent from today's files, and half-precision files of the wild hold them as floats.
    """
    prefix += "transformer."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.split(".")[0] in ("embeddings", "encoder", "final_layer_norm"):
            state_dict[f"{prefix}text_model.{name}"] = state_dict.pop(key)
    embeddings = module.transformer.text_model.embeddings
    weight = state_dict.get(f"{prefix}text_model.embeddings.position_embedding.weight")
    if weight is not None:
        length = embeddings.position_embedding.num_embeddings
        state_dict[f"{prefix}text_model.embeddings.position_ids"] = _position_ids(length, weight.device)
