"""Names in LoRA files: tell which layer of the model a key means, and which part of the change to it.

Our name of a layer is CompVis's: that of its weight in a checkpoint, without ".weight". Files name layers as diffusers
and transformers do, or as CompVis does, with a prefix and in a spelling of their own (FILE_NAMES), and the parts of a
change in several ways (PARTS). So all names that a layer may have are listed, and looked up.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."

# CompVis's names -> diffusers'. First where a block stands in the UNet; those of the two paths depend on its depth
# and are listed by `_places`.
PLACES = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# Then the layers of a block. Those of transformers have the same names.
LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}
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


def diffusers_names(modules: Iterable[str]) -> dict[str, str]:
    """Return CompVis's name -> diffusers' for modules of a UNet; `modules` must hold all its convolutions."""
    modules = list(modules)
    places = PLACES | _places(set(modules))
    found = {}
    for name in modules:
        parts = name.split(".")
        for size in (3, 2):
            place = ".".join(parts[:size])
            if place in places:
                rest = ".".join(parts[size:])
                found[name] = ".".join(filter(None, (places[place], LAYERS.get(rest, rest))))
                break
    return found


def _places(modules: set[str]) -> dict[str, str]:
    """Return the place in CompVis's two paths -> diffusers', which counts blocks by level. A sampler ends a level."""
    places = {}
    for path, short, sampler in (("input_blocks", "down", "op"), ("output_blocks", "up", "conv")):
        level = number = 0
        blocks = {int(name.split(".")[1]) for name in modules if name.startswith(f"{path}.")}
        for i in sorted(blocks - ({0} if short == "down" else set())):
            samplers = [k for k in range(3) if f"{path}.{i}.{k}.{sampler}" in modules]
            if samplers != [0]:
                places[f"{path}.{i}.0"] = f"{short}_blocks.{level}.resnets.{number}"
                places[f"{path}.{i}.1"] = f"{short}_blocks.{level}.attentions.{number}"
                number += 1
            if samplers:
                places[f"{path}.{i}.{samplers[0]}"] = f"{short}_blocks.{level}.{short}samplers.0"
                level, number = level + 1, 0
    return places


def names_in_files(layers: Iterable[str]) -> dict[str, str]:
    """Return every name that a file may give a layer -> our name of it. layers: our names of all of them."""
    layers = list(layers)
    unet = [name.removeprefix(UNET) for name in layers if name.startswith(UNET)]
    text = [name.removeprefix(TEXT) for name in layers if name.startswith(TEXT)]
    theirs = diffusers_names(unet)
    other_names = {UNET + name: (name, theirs.get(name, name)) for name in unet}
    other_names |= {TEXT + name: _text_names(name) for name in text}
    found: dict[str, str] = {}
    for network, spellings in FILE_NAMES.items():
        for ours in (name for name in layers if name.startswith(network)):
            for prefix, dot in spellings:
                found |= {prefix + name.replace(".", dot): ours for name in other_names[ours]}
    return found


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
