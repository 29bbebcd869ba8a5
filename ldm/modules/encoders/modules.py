"""Turn prompts into context vectors: CLIP's text tower with its tokenizer, as Stable Diffusion v1 uses them."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.chunks import Chunk, Chunker, PromptStyle
from ldm.modules.encoders.clip import ClipTextConfig, ClipTextModel, position_ids
from ldm.modules.encoders.prompt_syntax import STRONG, strong_pieces
from ldm.modules.encoders.tokenizer import FILES_WANTED, ClipTokenizer, TokenizerSource, has_tokenizer_files

logger = logging.getLogger(__name__)

VIT_L_14 = "openai/clip-vit-large-patch14"
AS_TEXT = PromptStyle(weights=False, long="cut")  # as the original reads prompts


class FrozenCLIPEmbedder(nn.Module):
    """CLIP's text tower with its tokenizer: prompts -> [B, max_length, hidden_size].

    version: name of the CLIP model. The sizes of ViT-L/14 are known; any other needs `text_config`. The tokenizer is
        looked for on the hub only if the name has an owner ("owner/name").
    device: where the weights are built (None: the current default device). They are not downloaded, but come from
        the checkpoint.
    max_length: tokens per prompt, start and end included; at most the tower's max_position_embeddings.
    text_config: fields of transformers' CLIPTextConfig that replace those of ViT-L/14.
    tokenizer: directory of the tokenizer's files, see `set_tokenizer`.
    trainable: leave the weights trainable; otherwise the module is frozen and stays in eval mode.

    The state_dict has the names of the checkpoints of 2022 (`transformer.text_model...`, with
    `...embeddings.position_ids`). The names of newer files, without `text_model.`, are accepted too.
    Raises ValueError for an unknown version, a bad field of text_config or a max_length out of range.
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
        # A name without an owner is no repository, and ViT-L/14 with other sizes is not the one on the hub.
        known_on_hub = "/" in version and (text_config is None or version != VIT_L_14)
        self.tokenizer_source = TokenizerSource(hub_name=version if known_on_hub else None)
        self._tokenizer: ClipTokenizer | None = None
        self._ids: dict[str, tuple[int, ...]] = {}  # of prompts tokenized before: training sees them many times
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)
        self._reported: set[str] = set()  # prompts whose end is not seen
        self._weighed: set[str] = set()  # prompts whose weights were looked at
        self._added: dict[str, Tensor] = {}  # vectors by name
        with torch.device(device if device is not None else torch.get_default_device()):
            self.transformer = ClipTextModel(config)
        self.register_load_state_dict_pre_hook(_accept_other_names)
        if not trainable:
            self.freeze()

    def freeze(self) -> None:
        """Switch off gradients for the weights, and stay in eval mode from now on."""
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
        self._ids.clear()

    def set_tokenizer_candidates(self, directories: Iterable[str | Path]) -> None:
        """Look in these directories, in order and before the hub, unless `set_tokenizer` named one."""
        self.tokenizer_source.candidates = tuple(map(Path, directories))
        self._tokenizer = None
        self._ids.clear()

    @property
    def tokenizer(self) -> ClipTokenizer:
        """The tokenizer, read at first use.

        Raises FileNotFoundError, which says what to put where; ValueError if it has more tokens than the model.
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
        """Return token ids [B, max_length]: start, text, end, padding. Brackets and the names of vectors are text.

        A longer prompt is cut; the first time, a warning shows the part that is not seen.
        """
        if new := {prompt for prompt in prompts if prompt not in self._ids}:
            chunker = Chunker(self.tokenizer, self.max_length)
            self._ids |= {prompt: self._split(chunker, prompt, AS_TEXT)[0].ids for prompt in new}
        return torch.tensor([self._ids[prompt] for prompt in prompts], dtype=torch.long)

    def _split(self, chunker: Chunker, prompt: str, style: PromptStyle) -> list[Chunk]:
        chunks, cut = chunker.split(prompt, style)
        if cut and prompt not in self._reported:
            self._reported.add(prompt)
            logger.warning("prompt longer than %d tokens, its end is not seen: %r", self.max_length, cut)
        if style.weights and prompt not in self._weighed:
            strong = strong_pieces(prompt)
            self._weighed.add(prompt)
            for piece in strong:
                text = "weight %g of %r: beyond %g pictures fall apart, 0.5 to 1.5 is wise"
                logger.warning(text, piece.weight, piece.text.strip(), STRONG)
        return chunks

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Return the tower's last hidden states of prompts [B], after the final norm: [B, max_length, hidden_size]."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"a list of prompts is expected, got {prompts!r}")
        device = next(self.transformer.parameters()).device
        return self.transformer(self.tokenize(prompts).to(device))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return what `forward` returns. CompVis's code calls it by this name."""
        return self(prompts)

    # --- weights, long prompts, added vectors -------------------------------------------------------------

    def set_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        """Let names in prompts stand for vectors [n, hidden_size] in place of tokens, instead of those set before.

        They are in no state_dict. Raises ValueError for vectors of another width, or for more than fit into a prompt.
        """
        width, room = self.transformer.text_model.config.hidden_size, self.max_length - 2
        for name, rows in vectors.items():
            if rows.ndim != 2 or rows.shape[1] != width:
                raise ValueError(f"embedding {name!r} has vectors of width {rows.shape[-1]}, the text encoder {width}")
            if not 1 <= len(rows) <= room:
                raise ValueError(f"embedding {name!r} has {len(rows)} vectors: a prompt has room for 1..{room}")
        self._added = dict(vectors)

    def chunks(self, prompt: str, style: PromptStyle) -> list[Chunk]:
        """Return the chunks of max_length tokens that a prompt is read as.

        What is cut off is told once, in full, and so are weights that are too strong. Raises ValueError for one that
        draws noise.
        """
        end, added = self.transformer.text_model.config.vocab_size, {}
        for name, rows in self._added.items():
            added[name] = range(end, end + len(rows))
            end += len(rows)
        return self._split(Chunker(self.tokenizer, self.max_length, added), prompt, style)

    def encode_chunks(self, batch: Sequence[Sequence[Chunk]]) -> Tensor:
        """Return the contexts [B, n max_length, hidden_size] of prompts [B] of n chunks each, float32.

        Each chunk is encoded by itself. Weights multiply the hidden states, which are then scaled so that the chunk's
        mean is what it was, as in stable-diffusion-webui. Raises ValueError for prompts of unlike numbers of chunks.
        """
        if len({len(chunks) for chunks in batch}) != 1:
            raise ValueError(f"prompts of {[len(chunks) for chunks in batch]} chunks cannot be in one batch")
        device = next(self.transformer.parameters()).device
        flat = [chunk for chunks in batch for chunk in chunks]
        added = torch.cat(list(self._added.values())).to(device) if self._added else None
        states = self.transformer(torch.tensor([chunk.ids for chunk in flat], device=device), added).float()
        weights = torch.tensor([chunk.weights for chunk in flat], device=device)
        if (weights != 1).any():
            states = _weighted(states, weights)
        return states.reshape(len(batch), -1, states.shape[-1])


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    """Return states [B, T, C] times weights [B, T], with the mean of each row as before."""
    weighted = states * weights[..., None]
    return weighted * (states.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True))


def _text_config(version: str, given: Mapping[str, Any] | None) -> ClipTextConfig:
    if given is None and version != VIT_L_14:
        raise ValueError(f"the sizes of {version!r} are not known here: give text_config, or version {VIT_L_14!r}")
    given = given or {}
    return ClipTextConfig.from_fields({str(key): given[key] for key in given})


def _accept_other_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_unused: Any) -> None:
    """Rename the entries of newer files before they are loaded, and put in the correct position ids.

    Newer files have neither `text_model.` in their names nor position ids. Some files in half precision hold the
    position ids as floats.
    """
    assert isinstance(module, FrozenCLIPEmbedder)
    prefix += "transformer."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.split(".")[0] in ("embeddings", "encoder", "final_layer_norm"):
            state_dict[f"{prefix}text_model.{name}"] = state_dict.pop(key)
    embeddings = module.transformer.text_model.embeddings
    weight = state_dict.get(f"{prefix}text_model.embeddings.position_embedding.weight")
    if weight is not None:
        length = embeddings.position_embedding.num_embeddings
        state_dict[f"{prefix}text_model.embeddings.position_ids"] = position_ids(length, weight.device)
