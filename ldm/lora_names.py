"""Names in LoRA files: tell which layer of the model a key means, and which part of the change to it.

Our name of a layer is CompVis's: that of its weight in a checkpoint, without ".weight". Files name layers as diffusers
and transformers do, or as CompVis does, with a prefix and in a spelling of their own (FILE_NAMES), and the parts of a
change in several ways (PARTS). So all names that a layer may have are listed, and looked up.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from ldm.diffusers_names import PREFIXES, TEXT_PREFIX, unet_names

UNET, TEXT = PREFIXES["unet"], PREFIXES["text_encoder"] + TEXT_PREFIX

# How a file spells the name of a layer of each network. "_" stands for names whose dots are underscores.
FILE_NAMES = {
    UNET: (
        ("lora_unet_", "_"),  # kohya
        ("unet.", "."),  # diffusers
        ("base_model.model.", "."),  # peft
        ("", "."),  # attention processors of old versions of diffusers, and a UNet that peft adapted in place
    ),
    TEXT: (
        ("lora_te_", "_"),
        ("lora_te1_", "_"),  # as diffusers writes kohya's format
        ("text_encoder.", "."),
        ("base_model.model.", "."),
        ("", "."),
    ),
}
# The end of a key -> which part of the change it is, and what it leaves of the layer's name.
PARTS: Sequence[tuple[str, str]] = (
    (r"\.lora_(?P<part>down|up|mid)\.weight", ""),  # kohya
    (r"\.lora_(?P<part>A|B)(\.\w+)?\.weight", ""),  # peft, and diffusers since 0.22; with the adapter's name or without
    (r"\.lora(_linear_layer)?\.(?P<part>down|up)\.weight", ""),  # diffusers before
    (r"(\.processor)?\.to_out_lora\.(?P<part>down|up)\.weight", ".to_out.0"),  # its attention processors
    (r"(\.processor)?\.(?P<to>to_[qkv])_lora\.(?P<part>down|up)\.weight", r".\g<to>"),
    (r"(\.lora)?\.(?P<part>alpha)", ""),
)
SAME_PART = {"A": "down", "B": "up"}
# The attention of the text encoder in files of attention processors.
OLD_TEXT_LAYERS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"}

# What else a file with unknown keys may be.
FOREIGN = (
    (r"\.hada_", "a LoHa of LyCORIS, which is not supported"),
    (r"\.lokr_", "a LoKr of LyCORIS, which is not supported"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA, which is not supported"),
    (r"\.oft_|oft_blocks|oft_diag", "an OFT, which is not supported"),
    (r"\.diff(_b)?$|\.on_input$|ia3_", "LyCORIS's whole differences or (IA)^3, which are not supported"),
    (r"lora_embedding_", "a LoRA of embeddings, which is not supported"),
    (r"double_blocks|single_transformer_blocks|single_blocks", "a LoRA of Flux"),
    (r"joint_blocks|^transformer\.|lora_transformer_", "a LoRA of Stable Diffusion 3 or another transformer"),
    (
        r"lora_te2_|text_encoder_2\.|add_embedding|label_emb|transformer_blocks[._][1-9]",
        "one of Stable Diffusion XL",
    ),
    (r"lora_te_.*layers_(1[2-9]|2\d)_|^text_encoder\..*layers\.(1[2-9]|2\d)\.", "one of Stable Diffusion 2"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.", "a checkpoint, which --ckpt takes"),
)


def names_in_files(layers: Iterable[str]) -> dict[str, str]:
    """Return every name that a file may give a layer -> our name of it. layers: our names of all of them."""
    layers = list(layers)
    unet = [name.removeprefix(UNET) for name in layers if name.startswith(UNET)]
    text = [name.removeprefix(TEXT) for name in layers if name.startswith(TEXT)]
    theirs = unet_names(unet)
    other_names = {UNET + name: (name, theirs.get(name, name)) for name in unet}
    other_names |= {TEXT + name: _text_names(name) for name in text}
    found: dict[str, str] = {}
    for network, spellings in FILE_NAMES.items():
        for ours in (name for name in layers if name.startswith(network)):
            for prefix, dot in spellings:
                found |= {prefix + name.replace(".", dot): ours for name in other_names[ours]}
    return found


def kohya_names(layers: Iterable[str]) -> dict[str, str]:
    """Return our names of the UNet's layers -> kohya's. layers: our names of all of them; others are left out."""
    unet = [name.removeprefix(UNET) for name in layers if name.startswith(UNET)]
    prefix, dot = FILE_NAMES[UNET][0]
    theirs = unet_names(unet)
    return {UNET + name: prefix + theirs.get(name, name).replace(".", dot) for name in unet}


def _text_names(name: str) -> tuple[str, ...]:
    """Return the names of a layer of the text encoder; newer versions of transformers leave "text_model." out."""
    before, _, last = name.rpartition(".")
    names = (name, f"{before}.{OLD_TEXT_LAYERS[last]}") if last in OLD_TEXT_LAYERS else (name,)
    return (*names, *(each.removeprefix("text_model.") for each in names))


def split_key(key: str) -> tuple[str, str] | None:
    """Return the file's name of the layer, and the part: "down", "up", "mid" or "alpha". None for an unknown ending."""
    for ending, rest in PARTS:
        match = re.search(ending + "$", key)
        if match:
            part = match["part"]
            return key[: match.start()] + match.expand(rest), SAME_PART.get(part, part)
    return None


def foreign_kind(keys: Iterable[str]) -> str:
    """Return what a file with these keys seems to be, to end an error message with; empty if nothing identifies it."""
    keys = list(keys)
    for pattern, what in FOREIGN:
        if any(re.search(pattern, key) for key in keys):
            return f"; it looks like {what}"
    return ""


def context_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return which model's LoRA has `down` factors of these shapes, if the width of the context tells it."""
    widths = {shape[1] for name, shape in shapes.items() if re.search(r"attn2[._]to_[kv]", name) and len(shape) > 1}
    if 1024 in widths:
        return "; it looks like one of Stable Diffusion 2 (a context of 1024)"
    return "; it looks like one of Stable Diffusion XL (a context of 2048)" if 2048 in widths else ""
