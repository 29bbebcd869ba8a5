"""DDIM, PLMS and DPM-Solver++ against recorded reference data and against diffusers' schedulers."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import (
    draw_noise,
    guided,
    make_ddim_timesteps,
    seeded_generators,
)
from ldm.util import instantiate_from_config

GOLDENS = Path(__file__).parents[1] / "goldens"
SCHEDULE = load_file(GOLDENS / "ldm_schedule.safetensors")
G = load_file(GOLDENS / "ldm_samplers.safetensors")
META = json.loads((GOLDENS / "ldm_samplers.json").read_text())
SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
SHAPE = (4, 16, 16)


class StubModel:
    """The model contract around a function eps(x, t, c), recording the calls it gets."""

    def __init__(self, eps=None):
        self.alphas_cumprod = SCHEDULE["buffers/alphas_cumprod"]
        self.num_timesteps = 1000
        self.device = torch.device("cpu")
        self.eps = eps or smooth_eps
        self.calls = []

    def apply_model(self, x, t, c):
        assert t.shape == (x.shape[0],)
        self.calls.append(SimpleNamespace(x=x, t=t, c=c))
        return self.eps(x, t, c)


def smooth_eps(x, t, c):
    """A noise prediction that depends on everything, row by row."""
    shift = 0.0 if c is None else c.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    return torch.tanh(0.5 * x + shift) * (0.5 + t.view(-1, 1, 1, 1) / 1000)


def replay(outputs):
    """A model that answers with recorded outputs, in order."""
    answers = iter(outputs)
    return StubModel(lambda x, t, c: next(answers))


@pytest.fixture(scope="module")
def tiny():
    config = OmegaConf.load(GOLDENS / "tiny_ldm.yaml")
    model = instantiate_from_config(config.model)
    weights = load_file(GOLDENS / "tiny_ldm.safetensors")
    model.load_state_dict({key: w.float() if w.is_floating_point() else w for key, w in weights.items()})
    return model.eval()


def run(sampler, S=10, **kwargs):
    """Sample the golden batch as it was recorded, unless told otherwise."""
    options = {
        "conditioning": G["cond"],
        "unconditional_guidance_scale": 7.5,
        "unconditional_conditioning": G["uncond"],
        "x_T": G["x_T"],
        "verbose": False,
        "log_every_t": 1,
    }
    batch = kwargs.pop("batch_size", 2)
    return sampler.sample(S, batch, kwargs.pop("shape", SHAPE), **(options | kwargs))


def error(actual, expected):
    """Largest error relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


# --- tables ------------------------------------------------------------------------------------------------

TABLES = sorted({key.rsplit("/", 1)[0] for key in SCHEDULE if key.startswith("ddim/")})


def test_ddim_tables_are_exact():
    assert len(TABLES) > 3
    for case in TABLES:
        _, S, eta = case.split("/")
        sampler = DDIMSampler(StubModel())
        sampler.make_schedule(int(S[1:]), ddim_eta=float(eta[3:]), verbose=False)
        for name in ("timesteps", "alphas", "alphas_prev", "sigmas", "sqrt_one_minus_alphas"):
            expected = SCHEDULE[f"{case}/ddim_{name}"].numpy()
            actual = np.asarray(getattr(sampler, f"ddim_{name}"))
            assert actual.dtype == expected.dtype, (case, name)
            np.testing.assert_array_equal(actual, expected, err_msg=f"{case} {name}")


def test_quadratic_timesteps_are_exact():
    for S in (10, 50):
        expected = SCHEDULE[f"ddim_quad/S{S}/ddim_timesteps"].numpy()
        np.testing.assert_array_equal(make_ddim_timesteps("quad", S, 1000), expected)


def test_every_step_count_stays_inside_the_schedule():
    for S in range(1, 1001):
        steps = make_ddim_timesteps("uniform", S, 1000)
        assert len(steps) >= S, S
        assert steps[0] == 1 and steps[-1] <= 999 and (np.diff(steps) >= 0).all(), S


# --- update rules, replaying the recorded model ------------------------------------------------------------


def test_update_rule_with_recorded_model_outputs():
    for name, sampler in SAMPLERS.items():
        model = replay(G[f"{name}/S10/model_out"])
        samples, inter = run(sampler(model))
        times = torch.stack([call.t.float() for call in model.calls])
        torch.testing.assert_close(times, G[f"{name}/S10/model_t"], rtol=0, atol=1e-4)
        assert error(samples, G[f"{name}/S10/samples"]) < 2e-6, name
        assert error(torch.stack(inter["x_inter"]), G[f"{name}/S10/x_inter"]) < 2e-6, name
        if name != "dpm":
            assert error(torch.stack(inter["pred_x0"]), G[f"{name}/S10/pred_x0"]) < 2e-6, name


# --- the schedule ------------------------------------------------------------------------------------------


def test_the_schedule_is_the_times_that_the_model_sees():
    for name, kind in (("ddim", int), ("plms", int), ("dpm", float)):
        for S in (1, 2, 10, 15, 340):  # 15 and 340 do not divide 1000: DDIM takes more steps
            model = StubModel()
            sampler = SAMPLERS[name](model)
            times = sampler.schedule(S)
            assert {type(t) for t in times} == {kind}, (name, S)
            sampler.sample(S, 1, (4, 2, 2), verbose=False)
            expected = torch.float32 if name == "dpm" else torch.int64
            assert {call.t.dtype for call in model.calls} == {expected}, (name, S)
            seen = [call.t.item() for call in model.calls]
            assert seen == torch.tensor(times, dtype=expected).tolist(), (name, S)
    assert DDIMSampler(StubModel()).schedule(4, eta=1.0) == [751, 501, 251, 1]
    assert PLMSSampler(StubModel()).schedule(4) == [751, 501, 501, 251, 1]


def test_the_schedule_leaves_the_tables_alone():
    for name in ("ddim", "plms"):
        sampler = SAMPLERS[name](StubModel())
        sampler.make_schedule(10, verbose=False)
        sampler.schedule(20)
        assert len(sampler.ddim_timesteps) == len(sampler.ddim_alphas) == 10, name


def test_the_schedule_refuses_what_sample_refuses():
    for name, sampler in SAMPLERS.items():
        for change in ({"S": 0}, {"S": 1001}, {"S": 5, "eta": 1.5}):
            with pytest.raises(ValueError, match=r"1\.\.1000" if "eta" not in change else "eta"):
                sampler(StubModel()).schedule(**change)
        if name != "ddim":
            with pytest.raises(ValueError, match="eta must be 0"):
                sampler(StubModel()).schedule(5, eta=0.5)


# --- whole trajectories of the tiny model ------------------------------------------------------------------


@pytest.mark.slow
def test_trajectory(tiny):
    for name, S in itertools.product(SAMPLERS, (10, 50)):
        samples, inter = run(SAMPLERS[name](tiny), S=S)
        assert error(samples, G[f"{name}/S{S}/samples"]) < 1e-4, (name, S)
        for what, trajectory in inter.items():
            if f"{name}/S{S}/{what}" in G:
                assert error(torch.stack(trajectory), G[f"{name}/S{S}/{what}"]) < 1e-4, (name, S, what)


def test_decoded_image(tiny):
    samples, _ = run(DDIMSampler(tiny))
    with torch.no_grad():
        image = tiny.decode_first_stage(samples)
    assert error(image, G["ddim/S10/decoded_image"]) < 1e-4


def test_without_guidance(tiny):
    samples, _ = run(DDIMSampler(tiny), unconditional_guidance_scale=1.0)
    assert error(samples, G["ddim_noguide/S10/samples"]) < 1e-4


def test_stochastic_ddim(tiny):
    seed = META["ddim_eta1"]["seed"]
    for global_rng in (False, True):
        generator = None if global_rng else torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed if global_rng else seed + 1)
            samples, inter = run(DDIMSampler(tiny), eta=1.0, generator=generator)
        assert error(samples, G["ddim_eta1/S10/samples"]) < 1e-4, global_rng
        assert error(torch.stack(inter["x_inter"]), G["ddim_eta1/S10/x_inter"]) < 1e-4, global_rng


def test_img2img(tiny):
    sampler, t_enc = DDIMSampler(tiny), META["img2img"]["t_enc"]
    sampler.make_schedule(META["img2img"]["S"], verbose=False)
    for t in (t_enc, torch.tensor([t_enc, t_enc])):
        z = sampler.stochastic_encode(G["img2img/x0"], t, G["img2img/noise"])
        assert error(z, G["img2img/z_enc"]) < 1e-6, t
    decoded = sampler.decode(z, G["cond"], t_enc, 7.5, G["uncond"], verbose=False)
    assert error(decoded, G["img2img/decoded"]) < 1e-4


def test_decode_over_the_whole_schedule_is_sample():
    for name in ("ddim", "plms"):
        sampler = SAMPLERS[name](StubModel())
        samples, _ = run(sampler)
        decoded = sampler.decode(G["x_T"], G["cond"], 10, 7.5, G["uncond"], verbose=False)
        assert torch.equal(decoded, samples), name


# --- an independent implementation -------------------------------------------------------------------------

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading"}


def diffusers_walk(scheduler, S, **step_options):
    """The stub's trajectory in the hands of a diffusers scheduler."""
    x = G["x_T"]
    scheduler.set_timesteps(S)
    for t in scheduler.timesteps:
        eps = smooth_eps(x, t.expand(len(x)).float(), None)
        x = scheduler.step(eps, t, x, **step_options).prev_sample
    return x


def test_ddim_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for S, eta in itertools.product((4, 20), (0.0, 0.3, 1.0)):
        scheduler = diffusers.DDIMScheduler(**BETAS, **LEADING, clip_sample=False)
        expected = diffusers_walk(scheduler, S, eta=eta, generator=torch.Generator().manual_seed(1))
        samples, _ = DDIMSampler(StubModel()).sample(
            S, 2, SHAPE, x_T=G["x_T"], eta=eta, generator=torch.Generator().manual_seed(1), verbose=False
        )
        assert error(samples, expected) < 1e-5, (S, eta)


def test_plms_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for S in (4, 20):
        expected = diffusers_walk(diffusers.PNDMScheduler(**BETAS, **LEADING, skip_prk_steps=True), S)
        samples, _ = PLMSSampler(StubModel()).sample(S, 2, SHAPE, x_T=G["x_T"], verbose=False)
        assert error(samples, expected) < 1e-5, S


def test_dpm_solver_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for S in (9, 27):  # divisors of 999, for which all times are whole; on both sides of 15
        scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="sigma_min")
        expected = diffusers_walk(scheduler, S)
        samples, _ = DPMSolverSampler(StubModel()).sample(S, 2, SHAPE, x_T=G["x_T"], verbose=False)
        assert error(samples, expected) < 1e-5, S


def test_dpm_solver_ends_in_first_order_only_below_15_steps():
    for S, first_order in ((14, True), (15, False)):
        sampler = DPMSolverSampler(StubModel())
        samples, inter = run(sampler, S=S)
        alpha, sigma, lam = sampler.alphas, sampler.sigmas, sampler.lambdas
        x0, x = inter["pred_x0"][-1], inter["x_inter"][-2]
        expected = sigma[-1] / sigma[-2] * x + alpha[-1] * (1 - np.exp(lam[-2] - lam[-1])) * x0
        assert (error(samples, expected) < 1e-6) == first_order, S


# --- step counts, callbacks, logging -----------------------------------------------------------------------


def test_step_and_call_counts():
    cases = ((1, 1), (3, 4), (15, 16), (501, 1000), (1000, 1000))
    for name, (S, ddim_steps) in itertools.product(SAMPLERS, cases):
        model, steps, images = StubModel(), [], []
        samples, _ = SAMPLERS[name](model).sample(
            S,
            1,
            (4, 2, 2),
            callback=steps.append,
            img_callback=lambda pred_x0, i, images=images: images.append((i, pred_x0.shape)),
            verbose=False,
        )
        n = S if name == "dpm" else ddim_steps
        assert len(model.calls) == n + (name == "plms"), (name, S)
        assert steps == list(range(n)), (name, S)
        assert images == [(i, (1, 4, 2, 2)) for i in range(n)], (name, S)
        assert samples.isfinite().all(), (name, S)


def test_intermediates_are_thinned_by_log_every_t():
    _, every = run(DDIMSampler(StubModel()), log_every_t=1)
    samples, some = run(DDIMSampler(StubModel()), log_every_t=4)
    kept = [0, 1, 2, 6, 10]  # x_T, the first step, then every 4th counted back from the last
    for what in ("x_inter", "pred_x0"):
        assert len(every[what]) == 11
        assert all(torch.equal(a, every[what][k]) for a, k in zip(some[what], kept, strict=True))
    assert torch.equal(some["x_inter"][-1], samples)


def test_progress_bar_shows_only_if_verbose(capsys):
    for verbose in (False, True):
        run(DDIMSampler(StubModel()), verbose=verbose)
        assert ("DDIM: 100%" in capsys.readouterr().err) == verbose


# --- guidance ----------------------------------------------------------------------------------------------


def test_guidance_extrapolates_from_one_doubled_batch():
    model = StubModel()
    x, c, u = G["x_T"], G["cond"], G["uncond"]
    eps = guided(model, 2, c, u, 3.0)(x, 7)
    (call,) = model.calls
    assert torch.equal(call.x, torch.cat([x, x])) and torch.equal(call.c, torch.cat([u, c]))
    t = torch.full((2,), 7)
    expected = 3.0 * smooth_eps(x, t, c) - 2.0 * smooth_eps(x, t, u)
    torch.testing.assert_close(eps, expected)


def test_no_guidance_is_a_single_call():
    for uncond, scale in ((G["uncond"], 1.0), (None, 7.5)):
        model = StubModel()
        eps = guided(model, 2, G["cond"], uncond, scale)(G["x_T"], 7)
        (call,) = model.calls
        assert call.x.shape[0] == 2 and torch.equal(eps, smooth_eps(call.x, call.t, G["cond"])), scale


def test_guidance_joins_nested_conditioning():
    model = StubModel(lambda x, t, c: x)
    c, u = ({"c_crossattn": [G[k]], "c_concat": [G[k][:, :1]]} for k in ("cond", "uncond"))
    guided(model, 2, c, u, 2.0)(G["x_T"], 7)
    joined = model.calls[0].c
    assert torch.equal(joined["c_crossattn"][0], torch.cat([G["uncond"], G["cond"]]))
    assert joined["c_concat"][0].shape == (4, 1, 24)


def test_half_precision_output_returns_to_the_dtype_of_x():
    model = StubModel(lambda x, t, c: x.half())
    assert guided(model, 2, None, None, 1.0)(G["x_T"], 7).dtype == torch.float32


# --- noise -------------------------------------------------------------------------------------------------


def test_a_picture_does_not_depend_on_its_batch():
    def draw(name, eta, seeds, rows):
        return run(
            SAMPLERS[name](StubModel()),
            batch_size=len(seeds),
            x_T=None,
            conditioning=G["cond"][rows],
            unconditional_conditioning=G["uncond"][rows],
            generator=seeded_generators(seeds),
            eta=eta,
        )[0]

    for case in (("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("dpm", 0.0)):
        together = draw(*case, [42, 43], [0, 1])
        alone = torch.cat([draw(*case, [42], [0]), draw(*case, [43], [1])])
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(together[0], together[1]), case
        assert not torch.allclose(draw(*case, [44], [0]), alone[:1]), case


def noise_of(seeds):
    return draw_noise((len(seeds), *SHAPE), seeded_generators(seeds), "cpu")


def test_each_picture_starts_from_the_noise_of_its_seed():
    _, inter = run(DDIMSampler(StubModel()), x_T=None, generator=seeded_generators([3, 5]))
    assert torch.equal(inter["x_inter"][0], noise_of([3, 5]))
    assert torch.equal(noise_of([5]), noise_of([3, 5])[1:])


def test_noise_differs_from_step_to_step():
    generators = seeded_generators([0, 1])
    first, second = (draw_noise((2, *SHAPE), generators, "cpu") for _ in range(2))
    assert not torch.allclose(first, second)


def test_deterministic_walk_leaves_the_generator_alone():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    run(DDIMSampler(StubModel()), generator=generator)
    assert torch.equal(before, generator.get_state())


# --- inpainting --------------------------------------------------------------------------------------------


def test_inpainting_keeps_the_masked_half_at_the_noise_level_of_each_step():
    x0 = G["img2img/x0"]
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    unguided = {"conditioning": None, "unconditional_conditioning": None}

    def noise_put_on_x0(call):
        alpha_bar = float(SCHEDULE["buffers/alphas_cumprod"][round(float(call.t[0]))])
        return ((call.x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5)[..., :8]

    for name, sampler in SAMPLERS.items():
        model = StubModel()
        run(sampler(model), **unguided, x0=x0, mask=mask, generator=seeded_generators([0, 1]))
        first, last = model.calls[0], model.calls[-1]
        assert torch.equal(first.x[..., 8:], G["x_T"][..., 8:]), name
        assert error(noise_put_on_x0(first), noise_of([0, 1])[..., :8]) < 1e-5, name
        assert abs(float(noise_put_on_x0(last).std()) - 1) < 0.1, name


# --- refusals ----------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_the_model_is_called():
    cases = (
        ({"S": 0}, "1..1000, got 0"),
        ({"S": 1001}, "1..1000, got 1001"),
        ({"S": 2.5}, "whole number"),
        ({"eta": -0.1}, "eta"),
        ({"eta": 1.5}, "eta"),
        ({"batch_size": 0}, "batch_size"),
        ({"shape": (4, 16)}, "shape"),
        ({"shape": (4, 0, 16)}, "shape"),
        ({"x_T": torch.zeros(2, 4, 16, 8)}, "x_T must have shape"),
        ({"conditioning": torch.zeros(3, 11, 24)}, "conditioning of shape"),
        ({"unconditional_conditioning": torch.zeros(1, 11, 24)}, "unconditional conditioning of shape"),
        ({"unconditional_conditioning": torch.zeros(2, 7, 24)}, "same structure"),
        ({"unconditional_conditioning": {"c_crossattn": [torch.zeros(2, 11, 24)]}}, "same structure"),
        ({"conditioning": "a red circle"}, "got str"),
        ({"x_T": None, "generator": seeded_generators([1])}, "1 generators for 2"),
        ({"mask": torch.ones(1, 1, 16, 16)}, "both mask and x0"),
        ({"mask": torch.ones(8, 16), "x0": torch.zeros(2, *SHAPE)}, "mask of shape"),
        ({"mask": torch.ones(16, 16), "x0": torch.zeros(1, 2, *SHAPE)}, "x0 of shape"),
        ({"log_every_t": 0}, "log_every_t"),
    )
    for name, (change, message) in itertools.product(SAMPLERS, cases):
        model = StubModel()
        with pytest.raises(ValueError, match=message):
            run(SAMPLERS[name](model), **change)
        assert not model.calls, (name, change)


def test_deterministic_samplers_refuse_eta():
    for name in ("plms", "dpm"):
        with pytest.raises(ValueError, match=r"eta must be 0, got 0\.5"):
            run(SAMPLERS[name](StubModel()), eta=0.5)


def test_unknown_discretisation_is_refused():
    with pytest.raises(ValueError, match="cubic"):
        DDIMSampler(StubModel()).make_schedule(10, ddim_discretize="cubic")


def test_img2img_refuses_what_lies_outside_the_schedule():
    sampler = DDIMSampler(StubModel())
    with pytest.raises(ValueError, match="make_schedule"):
        sampler.stochastic_encode(G["img2img/x0"], 3)
    with pytest.raises(ValueError, match="make_schedule"):
        sampler.decode(G["x_T"], G["cond"], 3)
    sampler.make_schedule(10, verbose=False)
    with pytest.raises(ValueError, match=r"0\.\.9"):
        sampler.stochastic_encode(G["img2img/x0"], 10)
    with pytest.raises(ValueError, match=r"1\.\.10"):
        sampler.decode(G["x_T"], G["cond"], 11)


def test_latents_that_are_not_finite_end_the_walk_with_its_step():
    for name, sampler in SAMPLERS.items():
        for bad in (float("nan"), float("inf")):
            model = StubModel()
            model.eps = lambda x, t, c, calls=model.calls, bad=bad: torch.full_like(x, bad if len(calls) > 4 else 0.1)
            with pytest.raises(ValueError, match=r"step [45] of 8: latents are NaN or infinite"):
                sampler(model).sample(8, 1, SHAPE, verbose=False)
            assert len(model.calls) < 7, name
