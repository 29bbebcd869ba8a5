"""A CLIP of the project's own (Radford et al. 2021): a text tower and an image tower with one space of embeddings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.contrasts import PLACES
from ldm.data.reader import CLASSES, READING_SIDE, STRIDE, reader_trunk
from ldm.modules.encoders.clip import ClipEncoder, ClipEncoderConfig, initialise_tower
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import instantiate_from_config

LARGEST_SCALE = 100.0  # of the cosines, as in the paper's section 2.5


def grid_positions(side: int, width: int) -> Tensor:
    """Return a position embedding of a side x side grid, row by row, [side * side, width], of variance 1/2.

    Each axis has width / 4 frequencies, sine and cosine; the lowest makes a quarter of a turn over the picture.
    Raises ValueError for a width that is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} of the grid's positions must be a multiple of 4")
    places = (torch.arange(side) + 0.5) / side
    turns = torch.logspace(math.log2(0.25), math.log2(side / 2), width // 4, base=2)
    angles = 2 * math.pi * places[:, None] * turns
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)


class ImageTower(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> a vector each [B, width]: the reader's trunk, then a vision transformer.

    Pictures are averaged down to 128 x 128 pixels. The trunk's 16 x 16 cells, four by four, are the transformer's
    tokens, behind a class token whose output is returned (Xiao et al. 2021, "Early convolutions help transformers see
    better").
    vision_config: fields of ClipEncoderConfig. trunk: arguments of `reader_trunk`.
    """

    def __init__(self, vision_config: Mapping[str, Any], trunk: Mapping[str, int] | None = None) -> None:
        super().__init__()
        config = ClipEncoderConfig(**vision_config)
        sizes = {"width": 64, "features": 128, **(trunk or {})}
        self.side = READING_SIDE // STRIDE // 2
        self.trunk = reader_trunk(**sizes)
        self.patches = nn.Conv2d(sizes["features"], config.hidden_size, 2, stride=2)
        self.class_embedding = nn.Parameter(config.hidden_size**-0.5 * torch.randn(config.hidden_size))
        self.position_embedding = nn.Parameter(grid_positions(self.side, config.hidden_size))
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = ClipEncoder(config, causal=False)
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        initialise_tower(self.encoder, config)

    def forward(self, images: Tensor) -> Tensor:
        images = F.adaptive_avg_pool2d(images, READING_SIDE) if images.shape[2:] != (READING_SIDE,) * 2 else images
        cells = self.trunk(images.contiguous(memory_format=torch.channels_last))
        tokens = self.patches(cells).flatten(2).transpose(1, 2) + self.position_embedding  # [B, 64, width]
        first = self.class_embedding.expand(len(tokens), 1, -1)
        x = self.encoder(self.pre_norm(torch.cat([first, tokens], dim=1)))
        return self.post_norm(x[:, 0])


class ContrastiveModel(nn.Module):
    """Text tower and image tower, trained so that a picture and its caption get like embeddings.

    text_config: config of a FrozenCLIPEmbedder, the text encoder of a LatentDiffusion; its weights lie under `text.`.
    image_config: config of an ImageTower. projection_dim: length of the embeddings.
    arrangement_weight: of the second objective, see `arrangement_loss`.
    scheduler_config: how training changes the learning rate; kept as an attribute.
    """

    def __init__(
        self,
        text_config: Mapping[str, Any],
        image_config: Mapping[str, Any],
        projection_dim: int,
        arrangement_weight: float = 0.3,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.arrangement_weight = arrangement_weight
        self.scheduler_config = scheduler_config
        self.text: FrozenCLIPEmbedder = instantiate_from_config(text_config)
        self.image: ImageTower = instantiate_from_config(image_config)
        text_width = self.text.transformer.text_model.config.hidden_size
        self.text_projection = nn.Linear(text_width, projection_dim, bias=False)
        self.image_projection = nn.Linear(len(self.image.class_embedding), projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.arrangement_head = nn.Linear(projection_dim, len(PLACES) * (2 + sum(map(len, CLASSES.values()))))
        for projection in (self.text_projection, self.image_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines in the objective, at most LARGEST_SCALE."""
        return self.logit_scale.exp().clamp(max=LARGEST_SCALE)

    def project_images(self, images: Tensor) -> Tensor:
        """Return the embeddings [B, projection_dim], of any length, of pictures [B, 3, H, W] in [-1, 1]."""
        return self.image_projection(self.image(images)).float()

    def project_texts(self, captions: Sequence[str]) -> Tensor:
        """Return the embeddings [N, projection_dim], of any length, of N captions: those of their end tokens."""
        ids = self.text.tokenize(captions).to(self.logit_scale.device)
        ends = (ids == self.text.tokenizer.eos_id).int().argmax(dim=1)  # the first; the others are padding
        # The tower is causal, so that what comes behind the last end changes nothing.
        hidden = self.text.transformer(ids[:, : int(ends.max()) + 1])
        return self.text_projection(hidden[torch.arange(len(ids)), ends]).float()

    def embed_images(self, images: Tensor) -> Tensor:
        """Return the embeddings [B, projection_dim], of length 1, of pictures [B, 3, H, W] in [-1, 1]."""
        return F.normalize(self.project_images(images), dim=-1)

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """Return the embeddings [N, projection_dim], of length 1, of N captions."""
        return F.normalize(self.project_texts(captions), dim=-1)

    def forward(self, images: Tensor, captions: Sequence[str], wrong: Sequence[Sequence[str]]) -> "Contrast":
        """Compare B pictures with their captions and with wrong ones.

        captions: B. wrong: K lists of B captions; the k-th caption of each list contradicts the k-th picture.
        """
        pictures = self.project_images(images)
        texts = self.project_texts([*captions, *(caption for group in wrong for caption in group)])
        right = texts[: len(captions)]
        unit, unit_texts = F.normalize(pictures, dim=-1), F.normalize(texts, dim=-1)
        groups = unit_texts[len(captions) :].view(len(wrong), len(captions), -1)
        return Contrast(
            of_others=unit @ unit_texts[: len(captions)].T,
            of_wrong=torch.einsum("bd,kbd->bk", unit, groups),
            pictures=pictures,
            captions=right,
        )

    def loss(self, contrast: "Contrast", arrangement: Tensor) -> Tensor:
        """Return the objective of training, a scalar. arrangement: [B, places, attributes], of the B pictures."""
        of_pictures = self.arrangement_loss(contrast.pictures, arrangement)
        of_captions = self.arrangement_loss(contrast.captions, arrangement)
        return self.contrast_loss(contrast) + self.arrangement_weight * (of_pictures + of_captions)

    def contrast_loss(self, contrast: "Contrast") -> Tensor:
        """Return CLIP's symmetric cross-entropy, with the wrong captions as further choices for a picture.

        Yuksekgonul et al. 2023, section 4.
        """
        right = torch.arange(len(contrast.of_others), device=contrast.of_others.device)
        choices = self.scale * torch.cat([contrast.of_others, contrast.of_wrong], dim=1)
        return (F.cross_entropy(choices, right) + F.cross_entropy(self.scale * contrast.of_others.T, right)) / 2

    def arrangement_loss(self, embeddings: Tensor, arrangement: Tensor) -> Tensor:
        """Return the cross-entropy with which a linear map tells from embeddings what lies where.

        One map serves both towers. Contrast alone finds words long before it finds who is where: neither tower can
        learn to say "the red one is on the left" before the other can say it too.
        embeddings: [B, projection_dim]. arrangement: [B, places, attributes], see `ldm.data.contrasts.arrangement`.
        """
        logits = self.arrangement_head(embeddings).float().view(len(embeddings), len(PLACES), -1)
        present, *attributes = logits.split([2, *map(len, CLASSES.values())], dim=-1)
        filled = arrangement[..., 0] >= 0
        loss = F.cross_entropy(present.flatten(0, 1), filled.long().flatten())
        for k, classes in enumerate(attributes):
            loss = loss + F.cross_entropy(classes[filled], arrangement[..., k][filled])
        return loss


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A batch of B pictures compared with captions.

    of_others: cosines [B, B]; row i, column j: picture i and caption j. of_wrong: cosines [B, K] of each picture and
    its own wrong captions. pictures, captions: their embeddings [B, projection_dim], not normalised.
    """

    of_others: Tensor
    of_wrong: Tensor
    pictures: Tensor
    captions: Tensor

    @property
    def told_apart(self) -> Tensor:
        """Tell which wrong captions are further from their picture than the right one: bool [B, K]."""
        return self.of_others.diagonal()[:, None] > self.of_wrong

    @property
    def retrieved(self) -> Tensor:
        """Tell which pictures are nearest to their own caption among all of the batch: bool [B]."""
        return self.of_others.argmax(dim=1) == torch.arange(len(self.of_others), device=self.of_others.device)
