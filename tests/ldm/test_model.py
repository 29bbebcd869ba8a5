"""UNet, autoencoder and their blocks against recorded outputs of the reference implementation."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.modules.attention import CrossAttention, SpatialTransformer
from ldm.modules.diffusionmodules.model import AttnBlock
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, ResBlock, UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import ReconstructionLoss
from ldm.util import instantiate_from_config

GOLDENS = Path(__file__).parents[1] / "goldens"


def assert_close(actual, expected, what="", rtol=1e-5):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= rtol, f"{what}: relative error {error:.2e}"


@pytest.fixture(scope="module")
def params():
    return OmegaConf.load(f"{GOLDENS}/tiny_ldm.yaml").model.params


@pytest.fixture(scope="module")
def weights():
    return {key: value.float() for key, value in load_file(f"{GOLDENS}/tiny_ldm.safetensors").items()}


def build(config, weights, prefix):
    module = instantiate_from_config(config)
    module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return module.eval()


@pytest.fixture(scope="module")
def unet(params, weights):
    return build(params.unet_config, weights, "model.diffusion_model.")


@pytest.fixture(scope="module")
def vae(params, weights):
    return build(params.first_stage_config, weights, "first_stage_model.")


@pytest.fixture(scope="module")
def unet_golden():
    return load_file(f"{GOLDENS}/ldm_unet.safetensors")


@pytest.fixture(scope="module")
def vae_golden():
    return load_file(f"{GOLDENS}/ldm_vae.safetensors")


def test_timestep_embedding(unet_golden):
    for kind in ("int", "float"):
        for dim in (32, 320, 33):
            group = f"timestep_embedding/dim{dim}"
            t = unet_golden[f"{group}/t_{kind}"]
            error = (timestep_embedding(t, dim) - unet_golden[f"{group}/out_{kind}"]).abs().max()
            # exp differs by one ulp between processors, and t multiplies it
            assert error <= t.max() * 2**-24, (kind, dim)


@torch.no_grad()
def test_unet(unet, unet_golden):
    for case in ("square", "float_t", "nonsquare", "batch3", "one"):
        x, t, context, out = (unet_golden[f"unet/{case}/{name}"] for name in ("x", "t", "context", "out"))
        assert_close(unet(x, t, context=context), out, case)


@torch.no_grad()
def test_every_recorded_block(unet, unet_golden):
    """Each block on the recorded input of its own, so that errors cannot cancel or add up."""
    checked = 0
    for name, module in unet.named_modules():
        group = f"inter/{name}"
        if f"{group}/in0" not in unet_golden:
            continue
        inputs = [unet_golden[f"{group}/in{i}"] for i in range(2) if f"{group}/in{i}" in unet_golden]
        kwargs = {"context": unet_golden[f"{group}/in_context"]} if f"{group}/in_context" in unet_golden else {}
        assert_close(module(*inputs, **kwargs), unet_golden[f"{group}/out"], name)
        checked += 1
    assert checked == 17


@torch.no_grad()
def test_intermediate_activations(unet, unet_golden):
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
        for name, module in unet.named_modules()
    ]
    case = {name: unet_golden[f"unet/one/{name}"] for name in ("x", "t", "context")}
    unet(case["x"], case["t"], context=case["context"])
    for hook in hooks:
        hook.remove()
    names = [key.split("/")[1] for key in unet_golden if key.startswith("inter/") and key.endswith("/out")]
    assert len(names) > 80
    for name in names:
        assert_close(outputs[name], unet_golden[f"inter/{name}/out"], name)


@torch.no_grad()
def test_unet_takes_latents_of_any_size(unet):
    x = torch.randn(1, 4, 9, 14, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))
    out = unet(x, torch.tensor([3]), context=context)
    assert out.shape == x.shape and out.isfinite().all()


@torch.no_grad()
def test_autoencoder(vae, vae_golden):
    for case in ("a", "b"):
        golden = {name: vae_golden[f"{case}/{name}"] for name in ("image", "encoder_out", "moments", "sample", "kl")}
        assert_close(vae.encoder(golden["image"]), golden["encoder_out"], case)
        posterior = vae.encode(golden["image"])
        assert_close(posterior.parameters, golden["moments"], case)
        for name in ("mean", "logvar", "std"):
            assert_close(getattr(posterior, name), vae_golden[f"{case}/{name}"], (case, name))
        assert_close(posterior.kl(), golden["kl"], case)
        assert_close(posterior.sample(vae_golden[f"{case}/sample_noise"]), golden["sample"], case)
        assert_close(vae.post_quant_conv(golden["sample"]), vae_golden[f"{case}/post_quant"], case)
        assert_close(vae.decode(golden["sample"]), vae_golden[f"{case}/decode"], case)


def test_log_variance_is_clamped(vae_golden):
    posterior = DiagonalGaussianDistribution(vae_golden["clamp/moments"])
    for name in ("mean", "logvar", "std"):
        assert torch.equal(getattr(posterior, name), vae_golden[f"clamp/{name}"])


def test_gaussian_against_torch_distributions():
    moments = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = DiagonalGaussianDistribution(moments.flip(1))
    posterior = DiagonalGaussianDistribution(moments)
    p = torch.distributions.Normal(posterior.mean, posterior.std)
    q = torch.distributions.Normal(other.mean, other.std)
    x = moments[:, :4] * 0.3
    torch.testing.assert_close(posterior.nll(x), -p.log_prob(x).sum((1, 2, 3)))
    torch.testing.assert_close(posterior.kl(other), torch.distributions.kl_divergence(p, q).sum((1, 2, 3)))
    certain = DiagonalGaussianDistribution(moments, deterministic=True)
    assert torch.equal(certain.sample(), certain.mode()) and not certain.kl().any()


def test_encoder_refuses_sides_that_do_not_divide(vae):
    with pytest.raises(ValueError, match=r"66x64.*multiples of 4"):
        vae.encode(torch.zeros(1, 3, 64, 66))


SMALL = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
}


def randomised(unet, seed=0):
    """Zero-initialised layers would hide what flows through them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return unet


def test_options_of_the_unet():
    for options in (
        {"resblock_updown": True},
        {"use_scale_shift_norm": True},
        {"num_classes": 3},
        {"conv_resample": False},
        {"use_new_attention_order": True, "num_heads": -1, "num_head_channels": 16},
        {"use_spatial_transformer": True, "context_dim": 12, "transformer_depth": 2},
    ):
        unet = randomised(UNetModel(**(SMALL | options)))
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        y = torch.tensor([0, 2]) if "num_classes" in options else None
        context = torch.ones(2, 3, 12) if "context_dim" in options else None
        t = torch.tensor([5, 900])
        out = unet(x, t, context=context, y=y)
        assert out.shape == x.shape and out.isfinite().all() and out.std() > 0, options
        assert not torch.allclose(out, unet(x, t + 50, context=context, y=y)), options
        if y is not None:
            assert not torch.allclose(out, unet(x, t, y=y.flip(0))), options


def test_scale_shift_norm_is_film():
    block = randomised(ResBlock(32, 16, 0.0, use_scale_shift_norm=True))
    x, emb = torch.randn(1, 32, 4, 4), torch.randn(1, 16)
    scale, shift = block.emb_layers(emb)[..., None, None].chunk(2, dim=1)
    norm, rest = block.out_layers[0], block.out_layers[1:]
    expected = x + rest(norm(block.in_layers(x)) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, emb), expected)


def test_attention_orders_agree_after_permuting_the_rows():
    old = randomised(AttentionBlock(32, num_heads=2))
    new = AttentionBlock(32, num_heads=2, use_new_attention_order=True)
    new.load_state_dict(old.state_dict())
    rows = torch.arange(96).reshape(2, 3, 16).transpose(0, 1).reshape(-1)  # (head, qkv) -> (qkv, head)
    new.qkv.weight.data, new.qkv.bias.data = old.qkv.weight.data[rows], old.qkv.bias.data[rows]
    x = torch.randn(2, 32, 3, 5)
    torch.testing.assert_close(new(x), old(x))


def test_cross_attention_is_softmax_attention():
    torch.manual_seed(0)
    attention = CrossAttention(query_dim=12, context_dim=10, heads=3, dim_head=4).double()
    x, context = torch.randn(2, 7, 12).double(), torch.randn(2, 5, 10).double()
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    q = attention.to_q(x).reshape(2, 7, 3, 4)
    k = attention.to_k(context).reshape(2, 5, 3, 4)
    v = attention.to_v(context).reshape(2, 5, 3, 4)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 2
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    expected = attention.to_out(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
    torch.testing.assert_close(attention(x, context, mask=mask), expected)


def test_checkpointing_changes_no_gradient():
    options = {"use_spatial_transformer": True, "context_dim": 12}
    stored = randomised(UNetModel(**(SMALL | options)))
    recomputed = UNetModel(**(SMALL | options | {"use_checkpoint": True}))
    recomputed.load_state_dict(stored.state_dict())
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 12)
    for unet in (stored, recomputed):
        unet.train()(x, t, context=context).square().sum().backward()
    for a, b in zip(stored.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bad_arguments_are_refused():
    for options, message in (
        ({"context_dim": 12}, "go together"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"model_channels": 40}, "multiple of 32"),
        ({"use_fp16": True}, "use_fp16"),
        ({"n_embed": 8}, "n_embed"),
    ):
        with pytest.raises(ValueError, match=message):
            UNetModel(**(SMALL | options))


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="labels"):
        UNetModel(**SMALL)(torch.zeros(1, 4, 8, 8), torch.tensor([1]), y=torch.tensor([0]))
    with pytest.raises(ValueError, match="multiples of 2"):
        UNetModel(**SMALL, resblock_updown=True)(torch.zeros(1, 4, 9, 8), torch.tensor([1]))


class Operations(TorchDispatchMode):
    """Records the names of all operations that reach the kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "attention",
    [
        lambda x: SpatialTransformer(32, 2, 16, context_dim=8)(x, torch.randn(1, 3, 8)),
        lambda x: AttentionBlock(32, num_heads=2)(x),
        lambda x: AttentionBlock(32, num_heads=2, use_new_attention_order=True)(x),
        lambda x: AttnBlock(32)(x),
    ],
    ids=["SpatialTransformer", "AttentionBlock", "AttentionBlock, new order", "AttnBlock"],
)
def test_no_attention_matrix_is_kept(attention):
    with torch.no_grad(), Operations() as operations:
        attention(torch.randn(1, 32, 8, 12))
    assert any("scaled_dot_product_flash" in name for name in operations.names)
    assert not any("softmax" in name for name in operations.names)


def tiny_autoencoder(params):
    config = OmegaConf.to_container(params.first_stage_config)
    config["params"]["ddconfig"]["norm_groups"] = 8
    torch.manual_seed(0)
    return instantiate_from_config(config).eval()


@torch.no_grad()
def test_normalised_latents_decode_to_the_same_pictures(params):
    vae = tiny_autoencoder(params)
    pictures = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae.post_quant_conv.bias.normal_()
    before, posterior = vae(pictures, sample_posterior=False)
    std = posterior.std
    scale = posterior.sample().std(dim=[0, 2, 3])
    vae.normalise_latents(pictures)
    after, posterior = vae(pictures, sample_posterior=False)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.mode().mean([0, 2, 3]), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(posterior.mode().std([0, 2, 3]), torch.ones(4), rtol=0.02, atol=0)
    torch.testing.assert_close(posterior.std, std / scale[:, None, None], rtol=0.02, atol=1e-6)


@torch.no_grad()
def test_a_new_autoencoder_lets_flat_colours_through(params):
    """Two flat pictures differ in their reconstruction from the start; with PyTorch's own start they hardly do."""
    vae = tiny_autoencoder(params)
    colours = torch.tensor([[0.8, -0.6, 0.1], [-0.5, 0.4, 0.9]])[:, :, None, None].expand(2, 3, 32, 32)
    latents = vae.encode(colours).mode()
    assert (latents[0] - latents[1]).abs().mean() > 0.1
    assert vae.encode(colours).std.max() < 0.1


@torch.no_grad()
def test_reconstruction_loss_is_zero_for_equal_pictures_and_grows_with_blur():
    loss = ReconstructionLoss(kl_weight=0.0)
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 8, 2, 2))
    picture = torch.zeros(1, 3, 16, 16)
    picture[..., 8:] = 1.0
    assert loss(picture, picture, posterior)[0] == 0
    blurred = torch.nn.functional.avg_pool2d(picture, 5, 1, 2)
    shifted = picture + (blurred - picture).abs().mean()
    total, parts = loss(picture, blurred, posterior)
    # The same L1 distance costs more where edges are lost.
    assert total > loss(picture, shifted, posterior)[0] and parts["edge_loss"] > 0
    weighted = ReconstructionLoss(kl_weight=1.0)(picture, picture, DiagonalGaussianDistribution(torch.ones(1, 8, 2, 2)))
    torch.testing.assert_close(weighted[0], DiagonalGaussianDistribution(torch.ones(1, 8, 2, 2)).kl()[0])
