"""The noise process against recorded tables; the training objective against its definition."""

import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.lr_scheduler import LambdaLinearScheduler
from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config

GOLDENS = Path(__file__).parents[1] / "goldens"


def build(**params):
    config = OmegaConf.load(f"{GOLDENS}/tiny_ldm.yaml").model
    config.params.update(params)
    return instantiate_from_config(config)


@pytest.fixture(scope="module")
def model():
    return build().eval()


@pytest.fixture(scope="module")
def golden():
    return load_file(f"{GOLDENS}/ldm_schedule.safetensors")


def test_schedule_buffers_are_exact(model, golden):
    names = [k.removeprefix("buffers/") for k in golden if k.startswith("buffers/") and "lvlb" not in k]
    assert len(names) == 12
    for name in names:
        assert torch.equal(getattr(model, name), golden[f"buffers/{name}"]), name


def test_beta_schedules(golden):
    for name in ("linear", "sqrt_linear", "sqrt", "cosine"):
        betas = make_beta_schedule(name, 1000, linear_start=1e-4, linear_end=2e-2)
        torch.testing.assert_close(betas, golden[f"beta_schedule/{name}"], rtol=1e-12, atol=1e-15)


def test_noise_process(model, golden):
    for case in ("mid", "edge"):
        g = {key.split("/")[2]: value for key, value in golden.items() if key.startswith(f"q/{case}/")}
        x_t = model.q_sample(g["x0"], g["t"], g["noise"])
        torch.testing.assert_close(x_t, g["q_sample"], rtol=1e-6, atol=1e-6)
        x_0 = model.predict_start_from_noise(x_t, g["t"], g["noise"])
        torch.testing.assert_close(x_0, g["predict_start_from_noise"], rtol=1e-5, atol=1e-5)
        mean, variance, logvar = model.q_posterior(g["x0"], x_t, g["t"])
        torch.testing.assert_close(mean, g["q_posterior_mean"], rtol=1e-6, atol=1e-6)
        assert torch.equal(variance, g["q_posterior_var"]) and torch.equal(logvar, g["q_posterior_logvar"]), case


def test_first_stage_of_the_whole_model(model, golden):
    vae = load_file(f"{GOLDENS}/ldm_vae.safetensors")
    weights = {k: v.float() for k, v in load_file(f"{GOLDENS}/tiny_ldm.safetensors").items()}
    model.load_state_dict(weights)
    with torch.no_grad():
        posterior = model.encode_first_stage(vae["a/image"])
        scaled = model.get_first_stage_encoding(posterior, noise=vae["a/sample_noise"])
        torch.testing.assert_close(scaled, vae["a/first_stage_encoding"], rtol=1e-5, atol=1e-5)
        decoded = model.decode_first_stage(vae["a/z_scaled"])
        torch.testing.assert_close(decoded, vae["a/decode_first_stage"], rtol=1e-5, atol=3e-5)


def test_conditioning_may_be_wrapped(model):
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 24)
    with torch.no_grad():
        plain = model.apply_model(x, t, c)
        assert torch.equal(plain, model.apply_model(x, t, [c]))
        assert torch.equal(plain, model.apply_model(x, t, {"c_crossattn": [c]}))


def batch_of(model, n=4):
    generator = torch.Generator().manual_seed(0)
    return {
        "moments": torch.randn(n, 8, 8, 8, generator=generator),
        model.cond_stage_key: torch.randn(n, 5, 24, generator=generator),
    }


def test_loss_is_the_weighted_error_of_the_noise(model):
    batch = batch_of(model)
    x_0 = model.get_input(batch)
    t, noise = torch.tensor([0, 10, 500, 999]), torch.randn_like(x_0)
    context = batch[model.cond_stage_key]
    with torch.no_grad():
        error = (model.apply_model(model.q_sample(x_0, t, noise), t, context) - noise).square().mean([1, 2, 3])
        torch.testing.assert_close(model.p_losses(x_0, context, t, noise), error.mean())


def test_loss_weights(model):
    batch = batch_of(model)
    x_0 = model.get_input(batch)
    t, noise = torch.tensor([0, 10, 500, 999]), torch.randn_like(x_0)
    context = batch[model.cond_stage_key]
    alpha_bar = model.alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    weights = {
        "uniform": torch.ones_like(snr),
        "min_snr": torch.minimum(snr, torch.tensor(4.0)) / snr,
        "debiased": snr**-0.5 / (snr**-0.5).mean(),
        "debiased, cut": (snr**-0.5).clamp(max=4) / (snr**-0.5).clamp(max=4).mean(),
    }
    with torch.no_grad():
        error = (model.apply_model(model.q_sample(x_0, t, noise), t, context) - noise).square().mean([1, 2, 3])
        for name, weight in weights.items():
            name, cut = name.removesuffix(", cut"), name.endswith("cut")
            weighted = build(loss_weight=name, snr_gamma=4.0, max_loss_weight=4.0 if cut else None).eval()
            weighted.load_state_dict(model.state_dict())
            loss = weighted.p_losses(x_0, context, t, noise)
            torch.testing.assert_close(loss, (error * weight[t]).mean().float())


def test_unknown_loss_weight_is_refused():
    with pytest.raises(ValueError, match="loss_weight 'snr' is unknown"):
        build(loss_weight="snr")


def test_focus_draws_a_share_of_the_timesteps_from_a_range(model):
    focused = build(focus=[100, 299, 0.75])
    torch.manual_seed(0)
    within = ((t := focused.train()._draw_timesteps(20000)) >= 100) & (t <= 299)
    assert abs(within.float().mean().item() - (0.75 + 0.25 * 0.2)) < 0.01
    assert t[within].min() == 100 and t[within].max() == 299
    assert t[~within].min() < 5 and t[~within].max() > 995
    spread = focused.eval()._draw_timesteps(20000)
    assert abs(((spread >= 100) & (spread <= 299)).float().mean().item() - 0.2) < 0.01


def test_wrong_focus_and_weights_without_effect_are_refused():
    for focus in ([1, 2], [300, 200, 0.5], [0, 1000, 0.5], [-1, 10, 0.5], [0, 10, 0.0], [0, 10, 1.5]):
        with pytest.raises(ValueError, match=r"focus .* must be"):
            build(focus=focus)
    with pytest.raises(ValueError, match="max_loss_weight has no effect"):
        build(loss_weight="min_snr", max_loss_weight=4.0)


def test_moments_and_pictures_give_the_same_latents(model):
    picture = torch.rand(2, 16, 16, 3) * 2 - 1
    with torch.no_grad():
        posterior = model.encode_first_stage(picture.permute(0, 3, 1, 2))
    torch.manual_seed(3)
    from_moments = model.get_input({"moments": posterior.parameters})
    torch.manual_seed(3)
    from_picture = model.get_input({model.first_stage_key: picture})
    torch.testing.assert_close(from_moments, from_picture)
    assert from_moments.shape == (2, 4, 4, 4)


def test_captions_are_dropped_in_training_only():
    model = build(unconditional_rate=0.25)
    captions = ["a red circle"] * 2000
    torch.manual_seed(0)
    dropped = model.train()._drop_captions(captions)
    assert 0.2 < dropped.count("") / len(dropped) < 0.3
    assert set(dropped) == {"", "a red circle"}
    assert model.eval()._drop_captions(captions) == captions


def test_the_frozen_networks_stay_in_eval_mode():
    model = build().train()
    assert model.training and model.model.training
    assert not any(part.training for part in (model.first_stage_model, model.cond_stage_model))


def test_the_device_is_that_of_the_noise_schedule(model):
    assert model.device == torch.device("cpu")
    assert model.first_stage_model.device == torch.device("cpu")
    assert copy.deepcopy(model).to("meta").device == torch.device("meta")


def test_a_model_with_cross_attention_needs_a_context(model):
    with pytest.raises(ValueError, match="c_crossattn"):
        model.model(torch.zeros(1, 4, 8, 8), torch.tensor([1]))


def test_ema_scope_swaps_and_restores():
    model = build(use_ema=True)
    own = model.model.diffusion_model.out[2].bias
    own.data.fill_(2.0)
    with model.ema_scope():
        assert not own.any()
    assert (own == 2.0).all()
    with pytest.raises(RuntimeError), model.ema_scope():
        raise RuntimeError
    assert (own == 2.0).all()


def test_ema_follows_its_formula():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    ema = LitEma(layer, decay=0.5)
    layer.weight.data.fill_(3.0)
    ema(layer)  # decay = min(0.5, 2 / 11)
    assert ema.weight.item() == pytest.approx(2 / 11 * 1.0 + 9 / 11 * 3.0)
    assert set(ema.state_dict()) == {"decay", "num_updates", "weight"}
    with pytest.raises(ValueError, match="decay"):
        LitEma(layer, decay=1.5)


def test_ema_has_the_key_names_of_public_checkpoints():
    keys = build(use_ema=True).state_dict()
    for name in (key for key in keys if key.startswith("model.")):
        assert "model_ema." + name.removeprefix("model.").replace(".", "") in keys


def test_a_model_that_predicts_v_tells_eps():
    """Against the definition of v: what an ideal network would put out gives back the noise, at all timesteps."""
    model = build(parameterization="v").eval()
    x, noise, t = torch.randn(1000, 4, 2, 2), torch.randn(1000, 4, 2, 2), torch.arange(1000)
    alpha_bar = model.alphas_cumprod.double().view(-1, 1, 1, 1)
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x
    torch.testing.assert_close(model.get_v(x, noise, t).double(), v, rtol=1e-5, atol=1e-5)
    noisy = model.q_sample(x, t, noise)
    for times in (t, t.float()):
        torch.testing.assert_close(model.predict_eps_from_v(noisy, times, v.float()), noise, rtol=0, atol=1e-4)
    between = model.predict_eps_from_v(noisy[:-1], t[:-1] + 0.5, torch.zeros_like(noisy[:-1])) / noisy[:-1]
    sigma = (1 - alpha_bar).sqrt()
    assert (between > sigma[:-1]).all() and (between < sigma[1:]).all()


def test_training_of_v_compares_the_output_with_v():
    model = build(parameterization="v", unconditional_rate=0.0)
    x, noise, t, c = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)
    output = model.model(model.q_sample(x, t, noise), t, [c])
    wanted = (output - model.get_v(x, noise, t)).square().mean()
    torch.testing.assert_close(model.p_losses(x, c, t, noise), wanted)
    eps = model.apply_model(model.q_sample(x, t, noise), t, c)
    assert torch.equal(eps, model.predict_eps_from_v(model.q_sample(x, t, noise), t, output))
    with pytest.raises(ValueError, match="loss_weight 'debiased'"):
        build(parameterization="v", loss_weight="debiased").p_losses(x, c, t, noise)


def test_unsupported_settings_are_refused():
    for params in (
        {"parameterization": "x0"},
        {"loss_type": "huber"},
        {"conditioning_key": "concat"},
        {"num_timesteps_cond": 2},
        {"beta_schedule": "unknown"},
    ):
        with pytest.raises(ValueError, match=str(next(iter(params.values())))):
            build(**params)


def test_arguments_of_public_configs_are_known():
    build(ckpt_path=None, ignore_keys=[], scale_by_std=False, original_elbo_weight=0, concat_mode=True)
    with pytest.raises(ValueError, match="learn_logvar True"):
        build(learn_logvar=True)
    with pytest.raises(ValueError, match="no argument 'learn_logvars'"):
        build(learn_logvars=False)


def test_learning_rate_schedule():
    scheduler = LambdaLinearScheduler([10], f_min=[0.1], f_max=[1.0], f_start=[0.0], cycle_lengths=[100])
    assert scheduler.schedule(0) == 0.0
    assert scheduler.schedule(5) == pytest.approx(0.5)
    assert scheduler.schedule(10) == pytest.approx(0.1 + 0.9 * 0.9)
    assert scheduler.schedule(55) == pytest.approx(0.1 + 0.9 * 0.45)
    assert scheduler.schedule(100) == scheduler.schedule(10**6) == 0.1
    v1 = LambdaLinearScheduler([10000], f_min=[1.0], f_max=[1.0], f_start=[1e-6], cycle_lengths=[1e13])
    assert v1.schedule(5000) == pytest.approx(0.5, abs=1e-5) and v1.schedule(10**6) == 1.0
    with pytest.raises(ValueError, match="same length"):
        LambdaLinearScheduler([1, 2], f_min=[1.0], f_max=[1.0], f_start=[1.0], cycle_lengths=[1])


def test_posterior_sample_is_seedable():
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 8, 2, 2))
    draws = [posterior.sample(generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].std() > 0
