"""Merge tokens in a diffusers UNet: python examples/merge_tokens_diffusers.py

The UNet here is small and has random weights, so that nothing is downloaded. Put your own in its place: apply_patch
takes a whole pipeline just as well, for example that of StableDiffusionPipeline.from_pretrained(...).
"""

import sys
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed where dsdiff is installed

import tomesd

torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
latents, prompt = torch.randn(2, 4, 32, 48), torch.randn(2, 77, 32)

with torch.no_grad():
    before = unet(latents, 500, encoder_hidden_states=prompt).sample
    for ratio in (0.25, 0.5, 0.75):
        tomesd.apply_patch(unet, ratio=ratio)
        merged = unet(latents, 500, encoder_hidden_states=prompt).sample
        print(f"ratio {ratio}: the output differs by {(merged - before).norm() / before.norm():.1%}")
        for count in tomesd.token_report(unet):
            print(f"  {count.name}: {count.tokens_in} tokens, {count.tokens_processed} after merging")
    tomesd.remove_patch(unet)
    assert torch.equal(unet(latents, 500, encoder_hidden_states=prompt).sample, before)
