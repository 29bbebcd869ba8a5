"""Names of weights in CompVis's files, which are ours, and in those of diffusers and transformers: the table of rules.

Each network has its own rules. Those of the UNet are a place (PLACES, and `_places` for its two paths) and a layer
there (LAYERS). Those of the autoencoder replace a part of the name each. The text encoder has the names of
transformers, behind a prefix.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

# A network's folder in diffusers -> what the names of its weights begin with in CompVis's files.
PREFIXES: Mapping[str, str] = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
TEXT_PREFIX = "transformer."

# --- the UNet ----------------------------------------------------------------------------------------------

# First where a block stands; those of the two paths depend on the depth and are listed by `_places`.
PLACES = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
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


def unet_names(modules: Iterable[str]) -> dict[str, str]:
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


# --- the autoencoder ---------------------------------------------------------------------------------------

# Part of CompVis's name -> diffusers'. Levels of the decoder are counted from the other end, see `vae_names`.
VAE_RULES: Sequence[tuple[str, str]] = (
    (r"^encoder\.down\.(\d+)\.block\.(\d+)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"^encoder\.down\.(\d+)\.downsample\.conv", r"encoder.down_blocks.\1.downsamplers.0.conv"),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)", r"decoder.up_blocks.\1.resnets.\2"),
    (r"^decoder\.up\.(\d+)\.upsample\.conv", r"decoder.up_blocks.\1.upsamplers.0.conv"),
    (r"\.mid\.block_1", ".mid_block.resnets.0"),
    (r"\.mid\.block_2", ".mid_block.resnets.1"),
    (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.mid\.attn_1\.([qkv])", r".mid_block.attentions.0.to_\1"),
    (r"\.mid\.attn_1\.proj_out", ".mid_block.attentions.0.to_out.0"),
    (r"\.nin_shortcut", ".conv_shortcut"),
    (r"\.norm_out", ".conv_norm_out"),
)
# The attention in files of diffusers before 0.18 -> today's names.
OLD_VAE_RULES: Sequence[tuple[str, str]] = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)


def vae_names(modules: Iterable[str]) -> dict[str, str]:
    """Return CompVis's name -> diffusers' for modules of an autoencoder; `modules` must hold all of the decoder."""
    modules = list(modules)
    levels = [int(match[1]) for name in modules if (match := re.match(r"decoder\.up\.(\d+)\.", name))]
    last = max(levels, default=0)
    return {
        name: _replaced(re.sub(r"(?<=^decoder\.up\.)\d+", lambda match: str(last - int(match[0])), name), VAE_RULES)
        for name in modules
    }


def _replaced(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# --- all networks ------------------------------------------------------------------------------------------


def weight_names(network: str, keys: Iterable[str]) -> dict[str, str]:
    """Return our name -> diffusers' for the weights `keys` of a network, all of them, without the network's prefix.

    network: its folder in diffusers, see PREFIXES.
    """
    keys = list(keys)
    if network == "text_encoder":
        return {key: key.removeprefix(TEXT_PREFIX) for key in keys}
    modules = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    theirs = (unet_names if network == "unet" else vae_names)(modules)
    return {key: f"{theirs[module]}.{end}" for key in keys for module, _, end in [key.rpartition(".")]}


def our_names(network: str, keys: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """Return the name in a file of diffusers -> ours, for the names `stored` in it.

    keys: our names of all weights of the network. Names that are not of the table stay as they are, behind
    `TEXT_PREFIX` in the text encoder.
    """
    ours = {theirs: key for key, theirs in weight_names(network, keys).items()}
    prefix = TEXT_PREFIX if network == "text_encoder" else ""
    return {name: ours.get(_replaced(name, OLD_VAE_RULES), prefix + name) for name in stored}
