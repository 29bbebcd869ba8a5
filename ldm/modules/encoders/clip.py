"""The text tower of CLIP (Radford et al. 2021): token ids to context vectors.

The names of the weights and of the config's fields are those of transformers' CLIPTextModel, and on the CPU so are the
results, bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.compat import check_neutral


def quick_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}

# Fields of transformers' config that change nothing in the tower, whatever their values.
IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "pad_token_id",
        "projection_dim",
        "transformers_version",
    }
)
# Fields that would ask for another output or another computation: only these values are accepted.
NEUTRAL = {
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
}


@dataclass(frozen=True, kw_only=True)
class ClipEncoderConfig:
    """Sizes of a stack of transformer blocks. The defaults are those of ViT-L/14's text tower.

    attention_dropout: share of the attention weights that training drops. initializer_factor: scale of new weights.
    Raises ValueError for values that describe no tower.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_factor: float = 1.0

    section: ClassVar[str] = "vision_config"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{self.section}: {field.name} must be a whole number of 1 or more, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.section}: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"{self.section}: hidden_act {self.hidden_act!r} is unknown: use {' or '.join(ACTIVATIONS)}"
            )


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig(ClipEncoderConfig):
    """Sizes of a text tower. The defaults are those of ViT-L/14, the encoder of Stable Diffusion v1.

    Raises ValueError for values that describe no tower.
    """

    vocab_size: int = 49408
    max_position_embeddings: int = 77

    section: ClassVar[str] = "text_config"

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> "ClipTextConfig":
        """Make a config from fields of transformers' CLIPTextConfig; a field that is left out has ViT-L/14's value.

        Raises ValueError for an unknown field, and for one whose value would change what the tower computes.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known - IGNORED - set(NEUTRAL))
        if unknown:
            raise ValueError(f"text_config has no field {', '.join(map(repr, unknown))}")
        check_neutral(cls, {name: value for name, value in given.items() if name in NEUTRAL}, NEUTRAL)
        return cls(**{name: value for name, value in given.items() if name in known})


def position_ids(length: int, device: torch.device | None = None) -> Tensor:
    """Return the positions 0..length-1, int64 [1, length]."""
    return torch.arange(length, device=device)[None]


class ClipTextEmbeddings(nn.Module):
    """Token ids [B, T] -> the sum of the token's and the position's embedding [B, T, C].

    `added` [n, C] are embeddings of further tokens, whose ids follow the vocabulary's. `position_ids` is in the
    state_dict, as it was in the checkpoints of 2022.
    """

    position_ids: Tensor

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.register_buffer("position_ids", position_ids(config.max_position_embeddings))

    def forward(self, input_ids: Tensor, added: Tensor | None = None) -> Tensor:
        positions = self.position_ids[:, : input_ids.shape[1]]
        tokens = self.token_embedding(input_ids) if added is None else self._with_added(input_ids, added)
        return tokens + self.position_embedding(positions)

    def _with_added(self, input_ids: Tensor, added: Tensor) -> Tensor:
        own = self.token_embedding.num_embeddings
        tokens = self.token_embedding(input_ids.clamp(max=own - 1))
        further = added[(input_ids - own).clamp(min=0)].to(tokens.dtype)
        return torch.where((input_ids >= own)[..., None], further, tokens)


class ClipAttention(nn.Module):
    """Self-attention; where it is causal, each token sees itself and those before it. [B, T, C] -> [B, T, C]."""

    def __init__(self, config: ClipEncoderConfig, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (width // self.num_heads) ** -0.5
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.dropout if self.training else 0.0
        causal = self.causal and x.shape[1] > 1
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        """Split x [B, T, C] into heads [B, heads, T, C / heads]."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class ClipMLP(nn.Module):
    """The two linear layers of a block, with the activation between them."""

    def __init__(self, config: ClipEncoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ClipEncoderLayer(nn.Module):
    """A transformer block that normalises before attention and before the MLP. [B, T, C] -> [B, T, C]."""

    def __init__(self, config: ClipEncoderConfig, causal: bool = True) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEncoder(nn.Module):
    """The blocks of the tower, one after the other."""

    def __init__(self, config: ClipEncoderConfig, causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipEncoderLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipTextTransformer(nn.Module):
    """Token ids [B, T] -> the last hidden states after the final norm [B, T, C]. T is at most the longest position."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = ClipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        initialise_tower(self, config)

    def forward(self, input_ids: Tensor, added: Tensor | None = None) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids, added)))


@torch.no_grad()
def initialise_tower(tower: nn.Module, config: ClipEncoderConfig) -> None:
    """Draw new weights as CLIP does: normal, with deviations by width and depth. Biases are zero."""
    width, depth, factor = config.hidden_size, config.num_hidden_layers, config.initializer_factor
    outer, wide = factor * width**-0.5, factor * (2 * width) ** -0.5
    inner = outer * (2 * depth) ** -0.5
    deviations = {"q_proj": inner, "k_proj": inner, "v_proj": inner, "out_proj": outer, "fc1": wide, "fc2": inner}
    for name, module in tower.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 * factor)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviations[name.rpartition(".")[2]])
            nn.init.zeros_(module.bias)


class ClipTextModel(nn.Module):
    """Hold the tower under the name `text_model`, which begins the keys of Stable Diffusion's checkpoints."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.text_model = ClipTextTransformer(config)

    def forward(self, input_ids: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the last hidden states [B, T, C] of token ids [B, T]. added: see ClipTextEmbeddings."""
        return self.text_model(input_ids, added)
