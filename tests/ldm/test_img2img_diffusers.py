"""Drawing from latents, and inpainting, against diffusers' pipelines on the same UNet, noise and contexts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsdiff.draw_settings import SAMPLERS
from ldm.models.diffusion.sampler import Init, steps_from
from ldm.modules.diffusionmodules.openaimodel import UNetModel

GOLDENS = Path(__file__).parents[1] / "goldens"
ALPHAS_CUMPROD = load_file(GOLDENS / "ldm_schedule.safetensors")["buffers/alphas_cumprod"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
pytestmark = pytest.mark.filterwarnings("ignore:The configuration file:FutureWarning")  # of diffusers' schedulers
SHAPE, SEEDS, SCALE = (4, 8, 8), (42, 43), 3.0
OURS = {"ddim", "euler", "euler_a", "dpmpp_2m_karras", "unipc", "lcm", "tcd"}  # those that diffusers has, too


class Model(torch.nn.Module):
    """A small UNet with random weights, in the contract of samplers; `calls` are the times of its calls."""

    alphas_cumprod, num_timesteps, device = ALPHAS_CUMPROD, 1000, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.unet = UNetModel(
            image_size=8,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=1,
            attention_resolutions=[1],
            channel_mult=[1],
            num_heads=4,
            use_spatial_transformer=True,
            transformer_depth=1,
            context_dim=16,
        ).eval()
        for parameter in self.unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        self.calls = []

    def apply_model(self, x, t, c):
        self.calls.append(t[0].item())
        return self.unet(x, t, context=c)


@pytest.fixture(scope="module")
def given():
    """(model, x0, contexts, contexts without prompt, noise by picture, mask of what is drawn)."""
    torch.manual_seed(0)
    model = Model()
    x0, context, empty = torch.randn(2, *SHAPE), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    drawn = torch.zeros(1, 1, 8, 8)
    drawn[..., 2:6, 1:5] = 1
    return model, x0, context, empty, drawn


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def ours(given, name, steps, strength, mask=False):
    model, x0, context, empty, drawn = given
    return SAMPLERS[name](model).sample(
        steps,
        2,
        SHAPE,
        context,
        unconditional_guidance_scale=SCALE,
        unconditional_conditioning=empty,
        generator=generators(),
        init=Init(x0=x0, strength=strength, drawn=drawn if mask else None),
        verbose=False,
    )[0]


def theirs(given, name, steps, strength, mask=False):
    import diffusers
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    model, x0, context, empty, drawn = given

    class Unet(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, sample_size=8, in_channels=4, time_cond_proj_dim=None):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, sample, t, encoder_hidden_states, **_):
            time = torch.as_tensor(t).float().expand(len(sample))
            return (model.unet(sample, time, context=encoder_hidden_states),)

    schedulers = {
        "ddim": lambda **betas: diffusers.DDIMScheduler(
            steps_offset=1, clip_sample=False, set_alpha_to_one=False, **betas
        ),
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
        "dpmpp_2m_karras": lambda **betas: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **betas),
        "unipc": diffusers.UniPCMultistepScheduler,
        "lcm": diffusers.LCMScheduler,
        "tcd": diffusers.TCDScheduler,
    }
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )  # of factor 8, unused
    kind = diffusers.StableDiffusionInpaintPipeline if mask else diffusers.StableDiffusionImg2ImgPipeline
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipeline = kind(vae=vae, unet=Unet(), scheduler=schedulers[name](**BETAS), requires_safety_checker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    more = {}
    if mask:
        pixels = drawn.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        more = {"mask_image": pixels.expand(2, -1, -1, -1), "height": 64, "width": 64}
        more["masked_image_latents"] = x0
    return pipeline(
        prompt_embeds=context,
        negative_prompt_embeds=empty,
        image=x0,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=SCALE,
        generator=generators(),
        output_type="latent",
        **({"eta": 0.3} if name == "tcd" else {}),
        **more,
    ).images


def error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
def test_latents_drawn_from_latents_are_those_of_diffusers(given):
    pytest.importorskip("diffusers")
    for name in sorted(OURS):
        for steps, strength in ((10, 0.75), (10, 0.3), (4, 1.0)):
            case = (name, steps, strength)
            assert error(ours(given, *case), theirs(given, *case)) < 1e-4, case


@pytest.mark.slow
def test_inpainted_latents_are_those_of_diffusers(given):
    pytest.importorskip("diffusers")
    for name in sorted(OURS):
        for steps, strength in ((10, 0.8), (5, 0.5)):
            case = (name, steps, strength)
            assert error(ours(given, *case, mask=True), theirs(given, *case, mask=True)) < 1e-4, case


def test_what_a_mask_keeps_is_kept_exactly_and_the_rest_is_not(given):
    _, x0, _, _, drawn = given
    for name in SAMPLERS:
        for strength in (0.5, 1.0):
            samples = ours(given, name, 6, strength, mask=True)
            kept = drawn.expand_as(samples) == 0
            assert torch.equal(samples[kept], x0[kept]), (name, strength)
            assert (samples - x0)[~kept].abs().min() > 0, (name, strength)


def test_the_model_is_called_at_the_last_times_of_the_schedule(given):
    model = given[0]
    for name, kind in SAMPLERS.items():
        for steps, strength in ((7, 0.6), (4, 1.0), (4, 0.25), (50, 0.1)):
            del model.calls[:]
            ours(given, name, steps, strength)
            times = kind(model).schedule_from(steps, None, strength)
            assert model.calls == pytest.approx(times), (name, steps, strength)
            taken = steps_from(kind.steps_taken(steps, 1000), strength)
            assert len(times) == taken + (name == "plms"), (name, steps, strength)
            whole = kind(model).schedule(steps)
            assert times[-1] == whole[-1] and set(times) <= set(whole), (name, steps, strength)


def test_the_less_strength_the_nearer_the_start(given):
    _, x0, *_ = given
    for name in SAMPLERS:
        far = [float((ours(given, name, 10, strength) - x0).square().mean()) for strength in (0.1, 0.5, 1.0)]
        assert far[0] < far[1] < far[2], (name, far)


def test_what_cannot_start_is_refused(given):
    model, x0, context, *_ = given
    sampler = SAMPLERS["ddim"](model)
    for strength, message in ((0.0, "above 0"), (1.5, "1 at most"), (0.01, "takes none of 10 steps: use 0.1 or more")):
        with pytest.raises(ValueError, match=message):
            sampler.sample(10, 2, SHAPE, context, init=Init(x0=x0, strength=strength), verbose=False)
    with pytest.raises(ValueError, match="either init"):
        init = Init(x0=x0, strength=0.5)
        sampler.sample(10, 2, SHAPE, context, init=init, mask=torch.ones(1), x0=x0, verbose=False)
