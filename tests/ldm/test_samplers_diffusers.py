"""Euler, DPM++ 2M Karras, UniPC, LCM and TCD against diffusers' schedulers, recorded and live; guidance by steps."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsdiff.draw_settings import SAMPLERS as ALL
from ldm.models.diffusion.ddpm import LatentDiffusion, with_zero_terminal_snr
from ldm.models.diffusion.euler import EulerSampler
from ldm.models.diffusion.guidance import guided_steps
from ldm.models.diffusion.lcm import boundary_scalings
from ldm.models.diffusion.sampler import seeded_generators
from ldm.modules.diffusionmodules.util import make_beta_schedule

GOLDENS = Path(__file__).parents[1] / "goldens"
spec = importlib.util.spec_from_file_location("make_diffusers", GOLDENS / "make_diffusers.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)

RECORDED = load_file(GOLDENS / "diffusers_samplers.safetensors")
ALPHAS_CUMPROD = load_file(GOLDENS / "ldm_schedule.safetensors")["buffers/alphas_cumprod"]
# The others have goldens of their own: see test_samplers.py.
NEW = {name: sampler for name, sampler in ALL.items() if name not in ("ddim", "plms", "dpm_solver")}
SHAPE = made.SHAPE


class Model:
    """The model contract around the prediction that diffusers' schedulers were given, recording its calls."""

    alphas_cumprod, num_timesteps, device = ALPHAS_CUMPROD, 1000, torch.device("cpu")

    def __init__(self):
        self.calls = []

    def apply_model(self, x, t, c):
        self.calls.append(SimpleNamespace(x=x, t=t, c=c))
        shift = 0.0 if c is None else c.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return made.smooth_eps(x + shift, t.float())


def error(actual, expected):
    """Largest error relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def draw(name, steps, eta=None, seeds=made.SEEDS, model=None, **options):
    sampler = ALL[name](model or Model())
    generator = seeded_generators(seeds)
    return sampler.sample(steps, len(seeds), SHAPE, eta=eta, generator=generator, verbose=False, **options)[0]


def contexts(n):
    cond, uncond = torch.linspace(0.2, 0.5, n), torch.linspace(-0.4, -0.1, n)
    return {
        "conditioning": cond.view(-1, 1, 1).expand(n, 5, 3),
        "unconditional_conditioning": uncond.view(-1, 1, 1).expand(n, 5, 3),
        "unconditional_guidance_scale": 3.0,
    }


# --- diffusers ---------------------------------------------------------------------------------------------


def test_recorded_walks_of_diffusers():
    assert {name for name, *_ in made.CASES} == set(NEW)
    for name, steps, eta in made.CASES:
        title = made.title(name, steps, eta)
        times = torch.tensor(NEW[name](Model()).schedule(steps, eta)).float()
        torch.testing.assert_close(times, RECORDED[f"{title}/times"], rtol=1e-6, atol=1e-4, msg=title)
        assert error(draw(name, steps, eta), RECORDED[f"{title}/samples"]) < 1e-4, title


def test_walks_of_the_diffusers_that_is_installed():
    pytest.importorskip("diffusers")
    for case in made.CASES:
        samples, times = made.walk(*case)
        assert error(draw(*case), samples) < 1e-4, case
        assert torch.equal(times, RECORDED[f"{made.title(*case)}/times"]), case


class PredictsV(Model):
    """The same network, whose output is read as v."""

    parameterization = "v"

    def apply_model(self, x, t, c):
        return LatentDiffusion.predict_eps_from_v(self, x, t, super().apply_model(x, t, c))


def test_walks_of_models_that_predict_v(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    plain = made.scheduler

    def predicts_v(name):
        if name == "ddim":
            ends = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
            return diffusers.DDIMScheduler(prediction_type="v_prediction", **ends, **made.BETAS)
        return type(plain(name)).from_config(plain(name).config, prediction_type="v_prediction")

    monkeypatch.setattr(made, "scheduler", predicts_v)
    for case in (*made.CASES, ("ddim", 20, None), ("ddim", 5, None)):
        samples, _ = made.walk(*case)
        assert error(draw(*case, model=PredictsV()), samples) < 1e-4, case
        assert error(draw(*case), samples) > 1e-2, case


def test_walks_on_a_schedule_that_ends_in_noise_alone(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    kinds = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        "unipc": (diffusers.UniPCMultistepScheduler, {}),
    }
    ends = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    monkeypatch.setattr(made, "scheduler", lambda name: kinds[name][0](**kinds[name][1], **ends, **made.BETAS))
    model = PredictsV()
    betas = make_beta_schedule("linear", 1000, 0.00085, 0.012).numpy()
    model.alphas_cumprod = torch.tensor(np.cumprod(1 - with_zero_terminal_snr(betas)), dtype=torch.float32)
    assert 0 < model.alphas_cumprod[-1] < 1e-7 and model.alphas_cumprod[0] == pytest.approx(1 - betas[0], abs=1e-6)
    for name in kinds:
        for steps in (5, 20):
            samples, _ = made.walk(name, steps, None)
            assert error(draw(name, steps, model=model), samples) < 1e-3, (name, steps)
    for name in ALL:
        assert draw(name, 4, model=model).abs().max() < 100, name


def test_the_default_eta_is_that_of_diffusers():
    assert torch.equal(draw("tcd", 4), draw("tcd", 4, 0.3))
    assert torch.equal(draw("euler_a", 5), draw("euler_a", 5, 1.0))


# --- properties --------------------------------------------------------------------------------------------


def test_a_walk_calls_the_model_at_the_times_of_its_schedule():
    for name, sampler in ALL.items():
        for steps in (1, 2, 7, 50):
            model = Model()
            times = sampler(model).schedule(steps)
            draw(name, steps, model=model)
            seen = [call.t[0].item() for call in model.calls]
            kinds = {type(time) for time in times}
            assert len(kinds) == 1 and {call.t.is_floating_point() for call in model.calls} == {float in kinds}, name
            assert seen == torch.tensor(times, dtype=model.calls[0].t.dtype).tolist(), (name, steps)
            assert len(times) == sampler.steps_taken(steps, 1000) + (name == "plms"), (name, steps)
            assert min(times) >= 0 and max(times) <= 999 and times == sorted(times, reverse=True), (name, steps)


def test_all_step_counts_give_finite_samples():
    for name, most in {
        "euler": 1000,
        "euler_a": 1000,
        "dpmpp_2m_karras": 1000,
        "unipc": 999,
        "lcm": 50,
        "tcd": 50,
    }.items():
        for steps in (1, most):
            assert draw(name, steps).isfinite().all(), (name, steps)
        for wrong in (0, most + 1):
            model = Model()
            for refused in (NEW[name](model).schedule, lambda S, name=name, model=model: draw(name, S, model=model)):
                with pytest.raises(ValueError, match=rf"whole number in 1\.\.{most}, got {wrong}"):
                    refused(wrong)
            assert not model.calls


def test_one_step_of_euler_starts_from_noise():
    """diffusers' linspace of one is [0], a start from no noise, which ours is not."""
    assert EulerSampler(Model()).schedule(1) == [999.0]
    model = Model()
    samples = draw("euler", 1, model=model)
    (call,) = model.calls
    eps = made.smooth_eps(call.x, call.t)
    alpha_bar = ALPHAS_CUMPROD[999]
    torch.testing.assert_close(
        samples, (call.x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), rtol=1e-4, atol=1e-4
    )


def test_eta_of_nothing_is_the_deterministic_relative():
    assert error(draw("euler_a", 7, 0.0), draw("euler", 7)) < 1e-6
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, two = (draw("tcd", 4, 0.0, x_T=torch.ones(2, *SHAPE), seeds=seeds) for seeds in ((1, 2), (3, 4)))
    assert torch.equal(one, two) and torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(draw("tcd", 4, 0.3), draw("tcd", 4, 0.0))


def test_tcd_with_all_noise_is_a_consistency_sampler():
    """With gamma 1 each step goes down to t = 0, and from there up as LCM does, which ends at x_0 itself."""
    model = Model()
    draw("tcd", 4, 1.0, model=model)
    first, second = model.calls[:2]
    a_0, a_1, a_t = ALPHAS_CUMPROD[[0, int(second.t[0]), int(first.t[0])]].tolist()
    eps = made.smooth_eps(first.x, first.t)
    x_0 = (first.x - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    x_s = a_0**0.5 * x_0 + (1 - a_0) ** 0.5 * eps
    generators = seeded_generators(made.SEEDS)
    noises = [made.start(generators) for _ in range(2)]
    torch.testing.assert_close(second.x, (a_1 / a_0) ** 0.5 * x_s + (1 - a_1 / a_0) ** 0.5 * noises[1])
    assert torch.equal(first.x, noises[0])


def test_lcms_boundary_condition():
    assert boundary_scalings(0) == (1.0, 0.0)
    c_skip, c_out = boundary_scalings(999)
    assert c_skip < 1e-7 and abs(c_out - 1) < 1e-7


def test_solvers_of_second_order_converge_faster_than_euler():
    """Against 900 steps of UniPC, the error of 40 steps is several times smaller with two orders."""
    exact = draw("unipc", 900)
    errors = {name: error(draw(name, 40), exact) for name in ("euler", "dpmpp_2m_karras", "unipc")}
    assert errors["unipc"] < errors["euler"] / 4 and errors["dpmpp_2m_karras"] < errors["euler"] / 2, errors


def test_a_picture_depends_on_its_own_seed_alone():
    for name in NEW:
        together = draw(name, 4, seeds=(42, 43, 44), **contexts(3))
        rows = contexts(3)
        for i, seed in enumerate((42, 43, 44)):
            own = {key: value[i : i + 1] if key.endswith("conditioning") else value for key, value in rows.items()}
            alone = draw(name, 4, seeds=(seed,), **own)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(together, draw(name, 4, seeds=(42, 43, 44), **contexts(3))), name
        assert not torch.allclose(together[0], together[1]), name


def test_each_step_of_stochastic_samplers_draws_new_noise():
    for name, count in (("euler_a", 4), ("lcm", 4), ("tcd", 4), ("euler", 1), ("unipc", 1)):
        after = seeded_generators((7,))
        ALL[name](Model()).sample(4, 1, SHAPE, generator=after, verbose=False)
        before = seeded_generators((7,))
        for _ in range(count):  # x_T, then each step but the last
            made.start(before)
        assert torch.equal(after[0].get_state(), before[0].get_state()), name


def test_inpainting_keeps_the_masked_half():
    mask, x0 = torch.zeros(1, 1, 8, 8), torch.full((1, 4, 1, 1), 0.7)
    mask[..., :4] = 1
    for name in NEW:
        model = Model()
        draw(name, 4, model=model, mask=mask, x0=x0)
        call = model.calls[-1]
        alpha_bar = float(np.interp(float(call.t[0]), np.arange(1000), ALPHAS_CUMPROD.numpy()))
        noise = (call.x - alpha_bar**0.5 * x0)[..., :4] / (1 - alpha_bar) ** 0.5
        assert abs(float(noise.std()) - 1) < 0.15 and abs(float(noise.mean())) < 0.2, name
        free = Model()
        draw(name, 4, model=free)
        assert torch.equal(model.calls[0].x[..., 4:], free.calls[0].x[..., 4:]), name


def test_eta_is_refused_where_it_has_no_meaning():
    for name, sampler in ALL.items():
        if sampler.default_eta is None:
            for eta in (0.5, 1.5):
                model = Model()
                with pytest.raises(ValueError, match=f"takes no eta: eta must be 0, got {eta}"):
                    draw(name, 4, eta, model=model)
                with pytest.raises(ValueError, match="takes no eta"):
                    sampler(model).schedule(4, eta)
                assert not model.calls
        else:
            for eta in (-0.1, 1.5):
                with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
                    draw(name, 4, eta)
                with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
                    sampler(Model()).schedule(4, eta)
    assert {name for name, sampler in ALL.items() if sampler.default_eta is not None} == {"ddim", "euler_a", "tcd"}


# --- guidance in some of the steps ---------------------------------------------------------------------------


def batches(name, steps, interval):
    model = Model()
    samples = draw(name, steps, model=model, guidance_interval=interval, **contexts(2))
    return samples, [len(call.x) for call in model.calls]


def test_an_interval_of_guidance_spares_samples():
    for name in ALL:
        first = 2 if name == "plms" else 1  # its first step calls the model twice
        for interval, guided in (((0, 1), 10), ((0, 0.5), 5), ((0.2, 0.7), 5), ((0.25, 0.35), 1), ((0.4, 0.4), 0)):
            _, seen = batches(name, 10, interval)
            start = next((i for i in range(10) if interval[0] <= i / 10 < interval[1]), 10)
            of_steps = [4 if start <= i < start + guided else 2 for i in range(10)]
            assert seen == [of_steps[0]] * first + of_steps[1:], (name, interval)


def test_an_interval_of_all_steps_is_full_guidance_and_an_empty_one_is_none():
    for name in ALL:
        full = draw(name, 5, **contexts(2))
        assert torch.equal(batches(name, 5, (0, 1))[0], full), name
        plain = draw(name, 5, conditioning=contexts(2)["conditioning"])
        for empty in ((0, 0), (0.5, 0.5), (1, 1)):
            assert torch.equal(batches(name, 5, empty)[0], plain), (name, empty)
        half = batches(name, 6, (0.2, 0.8))[0]
        assert not torch.allclose(half, full, atol=1e-3) and not torch.allclose(half, plain, atol=1e-3), name


def test_an_interval_is_the_same_as_guidance_of_those_predictions():
    """Multistep samplers keep their history across the ends of the interval: the same walk, by a model that guides."""

    class Guiding(Model):
        def apply_model(self, x, t, c):
            given = contexts(2)
            eps_c = super().apply_model(x, t, given["conditioning"])
            eps_u = super().apply_model(x, t, given["unconditional_conditioning"])
            return eps_u + 3.0 * (eps_c - eps_u) if t[0].item() in inside else eps_c

    for name in set(ALL) - {"plms"}:
        times = ALL[name](Model()).schedule(10)
        inside = {
            torch.tensor(time, dtype=torch.float32 if isinstance(time, float) else None).item() for time in times[3:7]
        }
        walked = draw(name, 10, model=Guiding())
        torch.testing.assert_close(batches(name, 10, (0.3, 0.7))[0], walked, rtol=1e-5, atol=1e-5, msg=name)


def test_intervals_out_of_order_are_refused():
    for interval in ((0.5, 0.2), (-0.1, 1), (0, 1.1), (float("nan"), 1)):
        model = Model()
        with pytest.raises(ValueError, match=r"shares of the steps in 0\.\.1, in order"):
            draw("ddim", 4, model=model, guidance_interval=interval, **contexts(2))
        assert not model.calls
    assert guided_steps(4, (0.25, 0.75)) == [False, True, True, False]
