"""Where the models that are shipped with this repository lie, and where others are looked for."""

from collections.abc import Mapping
from pathlib import Path

CHECKOUT, INSTALLED = Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1]
# The folder that holds configs/ and models/: that of a checkout, or the package itself where it was installed.
ROOT = CHECKOUT if (CHECKOUT / "configs/stable-diffusion/v1-inference.yaml").is_file() else INSTALLED

STABLE_DIFFUSION = ROOT / "configs/stable-diffusion/v1-inference.yaml"
EMBEDDED = ROOT / "configs/shapes/txt2img.yaml"
CONFIGS: Mapping[str, Path] = {"embedded": EMBEDDED, "sd-v1": STABLE_DIFFUSION}  # short names of models

# Config -> the places of its checkpoint. Without a config and a checkpoint the first file that exists is taken.
CHECKPOINTS: Mapping[Path, tuple[Path, ...]] = {
    STABLE_DIFFUSION: (
        ROOT / "models/ldm/stable-diffusion-v1/model.ckpt",
        ROOT / "models/ldm/stable-diffusion-v1/model.safetensors",
    ),
    EMBEDDED: (ROOT / "models/ldm/shapes/model.safetensors",),
}
# Checkpoint -> its cali_ckpts, by the bits of the weights.
CALI_CKPTS: Mapping[Path, Mapping[int, Path]] = {
    CHECKPOINTS[EMBEDDED][0]: {bits: ROOT / f"models/ldm/shapes/cali_w{bits}a8.safetensors" for bits in (4, 8)},
}
# Checkpoint -> its other cali_ckpts, by what they are in words.
OTHER_CALI_CKPTS: Mapping[Path, Mapping[str, Path]] = {
    CHECKPOINTS[EMBEDDED][0]: {"W4A8 dynamic": ROOT / "models/ldm/shapes/cali_w4a8_dynamic.safetensors"},
}
# Checkpoint -> its cali_ckpts that were made with a LoRA merged, which they name.
LORA_CALI_CKPTS: Mapping[Path, tuple[Path, ...]] = {
    CHECKPOINTS[EMBEDDED][0]: (ROOT / "models/ldm/shapes/cali_w4a8_lcm.safetensors",),
}
# Config -> the place of a tiny decoder of its latents.
TINY_DECODERS: Mapping[Path, Path] = {
    STABLE_DIFFUSION: ROOT / "models/ldm/stable-diffusion-v1/taesd_decoder.safetensors",
    EMBEDDED: ROOT / "models/ldm/shapes/tiny.safetensors",
}
CALI_PROMPTS_NAME = "cali_prompts.txt"  # beside a config: the prompts that calibration data is drawn from
READER = ROOT / "models/ldm/shapes/reader.safetensors"  # the detector that reads pictures of shapes
# The CLIP whose text tower the model for 256x256 pictures has: its image tower measures pictures.
SHAPES_CLIP_CONFIG = ROOT / "configs/shapes/clip.yaml"
SHAPES_CLIP = ROOT / "models/ldm/shapes/clip.safetensors"
TOKENIZER = ROOT / "models/ldm/shapes/tokenizer"  # of the embedded model
