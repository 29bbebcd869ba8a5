"""Make the recorded LoRAs: files that peft and diffusers write, and what diffusers computes with them.

    python tests/goldens/make_lora.py

Needs peft beside diffusers and transformers. The UNet is that of `q_unet.yaml` and `q_cali_w4a8.pth`, the text encoder
that of `clip_text_tiny`; both run in diffusers and transformers, under the names of `ldm.lora_names`.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

GOLDENS = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDENS.parents[1]))

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.training_utils import _collate_lora_metadata  # noqa: E402
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya  # noqa: E402
from peft import LoraConfig, get_peft_model_state_dict  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from ldm.diffusers_names import unet_names  # noqa: E402
from ldm.util import instantiate_from_config  # noqa: E402

SCALE = 0.7
# Layers of all kinds: attention, feed-forward, projections, convolutions, shortcuts, samplers, time embeddings.
UNET_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
    *("conv_in", "conv_out", "linear_1", "linear_2"),
]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def diffusers_unet() -> UNet2DConditionModel:
    """Return the UNet of the goldens in diffusers' layout."""
    ours = instantiate_from_config(OmegaConf.load(GOLDENS / "q_unet.yaml"))
    weights = torch.load(GOLDENS / "q_cali_w4a8.pth", weights_only=True)
    weights = {name: weights[f"model.{name}"] for name in ours.state_dict()}
    modules = {name: name.rpartition(".")[0] for name in weights}
    theirs = unet_names(set(modules.values()))
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.load_state_dict({f"{theirs[modules[name]]}.{name.rpartition('.')[2]}": w for name, w in weights.items()})
    return unet.eval()


def text_encoder() -> CLIPTextModel:
    """Return the text encoder of the goldens in transformers."""
    model = CLIPTextModel(CLIPTextConfig(**json.loads((GOLDENS / "clip_text_tiny.json").read_text())))
    weights = load_file(GOLDENS / "clip_text_tiny.safetensors")
    names = {name.removeprefix("text_model."): name for name in model.state_dict()}
    weights = {name.split("text_model.", 1)[1]: tensor for name, tensor in weights.items() if "text_model." in name}
    model.load_state_dict({own: weights[name] for name, own in names.items()})
    return model.eval()


def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder(),
        tokenizer=None,
        unet=diffusers_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw_factors(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Fill all factors with random numbers that `dtype` holds exactly; peft starts one of each pair with zeros."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            wide = torch.randn(parameter.shape) * (0.3 if "lora_B" in name else parameter[0].numel() ** -0.5)
            parameter.data = wide.to(dtype).float()


def write_adapters(pipe: StableDiffusionPipeline) -> None:
    """Write lora_peft (of the UNet), lora_diffusers and lora_kohya."""
    unet_config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=UNET_LAYERS,
        rank_pattern={"attn1.to_q": 3, "conv_in": 4},
        alpha_pattern={"attn1.to_q": 1, "proj_in": 4},
    )
    text_config = LoraConfig(r=3, lora_alpha=6, target_modules=TEXT_LAYERS)
    pipe.unet.add_adapter(unet_config)
    pipe.text_encoder.add_adapter(text_config)
    for model in (pipe.unet, pipe.text_encoder):
        draw_factors(model, torch.float16)
    factors = {
        "unet": {name: tensor.half() for name, tensor in get_peft_model_state_dict(pipe.unet).items()},
        "text_encoder": {name: tensor.half() for name, tensor in get_peft_model_state_dict(pipe.text_encoder).items()},
    }
    metadata = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    for config in metadata.values():
        config["target_modules"] = sorted(config["target_modules"])  # a set, in whatever order
    StableDiffusionPipeline.save_lora_weights(
        GOLDENS,
        unet_lora_layers=factors["unet"],
        text_encoder_lora_layers=factors["text_encoder"],
        weight_name="lora_diffusers.safetensors",
        **metadata,
    )
    named = {f"{part}.{name}": tensor for part, tensors in factors.items() for name, tensor in tensors.items()}
    kohya = convert_state_dict_to_kohya(named)
    for name in sorted(kohya):  # with the name that kohya's scripts give the only text encoder
        # One alpha for all: diffusers 0.42.1 loses those of single attention layers when it reads kohya's format.
        tensor = torch.tensor(1.5) if name.endswith(".alpha") else kohya[name].to(torch.bfloat16).contiguous()
        del kohya[name]
        kohya[name.replace("lora_te1_", "lora_te_")] = tensor
    save_file(kohya, GOLDENS / "lora_kohya.safetensors")


def write_peft() -> torch.nn.Module:
    """Write lora_peft, of the UNet; return the model in which peft put it."""
    from peft import get_peft_model

    config = LoraConfig(r=2, lora_alpha=1, use_rslora=True, target_modules=UNET_LAYERS, alpha_pattern={"to_k": 2})
    model = get_peft_model(diffusers_unet(), config)
    draw_factors(model, torch.bfloat16)
    for module in model.modules():
        for name in ("lora_A", "lora_B"):
            if hasattr(module, name):
                getattr(module, name).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        target = GOLDENS / "lora_peft"
        target.mkdir(exist_ok=True)
        target.joinpath("adapter_model.safetensors").write_bytes(
            (Path(folder) / "adapter_model.safetensors").read_bytes()
        )
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        config["target_modules"].sort()  # a set, in whatever order
        target.joinpath("adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for module in model.modules():
        for name in ("lora_A", "lora_B"):
            if hasattr(module, name):
                getattr(module, name).float()
    return model.eval()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    recorded = {
        "x": torch.randn(2, 4, 16, 16),
        "t": torch.tensor([901, 23]),
        "context": torch.randn(2, 7, 24),
        "ids": torch.randint(0, 120, (2, 77)),
    }

    def note(name: str, unet: torch.nn.Module, text: torch.nn.Module | None) -> None:
        x, t, context = recorded["x"], recorded["t"], recorded["context"]
        recorded[f"{name}/unet"] = unet(x, t, encoder_hidden_states=context).sample
        if text is not None:
            recorded[f"{name}/text"] = text(recorded["ids"]).last_hidden_state

    plain = pipeline()
    note("none", plain.unet, plain.text_encoder)
    write_adapters(plain)
    for name in ("lora_diffusers", "lora_kohya"):
        pipe = pipeline()
        pipe.load_lora_weights(GOLDENS, weight_name=f"{name}.safetensors", adapter_name="one")
        pipe.set_adapters(["one"], [SCALE])
        note(name, pipe.unet, pipe.text_encoder)
    note("lora_peft", write_peft(), None)
    save_file(recorded, GOLDENS / "lora.safetensors")
    for path in sorted(GOLDENS.glob("lora*")):
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
