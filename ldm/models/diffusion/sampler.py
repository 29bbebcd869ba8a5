"""The common parts of all samplers: step tables, guidance, noise, and the walk from x_T to x_0.

A sampler subclasses `Sampler` and gives its update rule as a generator (`_steps`). It calls a function
`predict_eps(x, t)` that already contains the guidance, and never sees the conditioning.

CompVis keeps `make_ddim_timesteps` and `make_ddim_sampling_parameters` among the UNet's utilities; here they are
beside their only users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Conditioning = Any  # a tensor [B, T, D], or a list or dict of such, however nested
Generators = torch.Generator | Sequence[torch.Generator] | None
PredictEps = Callable[[Tensor, int | float], Tensor]  # (x_t [B, C, H, W], t) -> eps [B, C, H, W]
DrawNoise = Callable[[], Tensor]  # () -> standard normal noise [B, C, H, W]
KeepKnown = Callable[[Tensor, float], Tensor]  # (x_t, alpha_bar_t) -> x_t with its known region restored
Step = tuple[Tensor, Tensor]  # (x after the step, the x_0 it was heading for)


# --- schedule tables ---------------------------------------------------------------------------------------


def check_steps(S: int, num_timesteps: int) -> None:
    """Raise ValueError unless S is a whole number of steps in 1..num_timesteps."""
    if not isinstance(S, int | np.integer) or isinstance(S, bool) or not 1 <= S <= num_timesteps:
        raise ValueError(f"number of sampling steps must be a whole number in 1..{num_timesteps}, got {S!r}")


def check_eta(eta: float) -> None:
    """Raise ValueError unless eta, the share of DDPM's noise put back at each step, lies in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")


def check_deterministic(sampler: str, eta: float) -> None:
    """Raise ValueError unless eta is 0, for a `sampler` (its name) that puts no noise back."""
    if eta != 0:
        raise ValueError(f"{sampler} is deterministic: eta must be 0, got {eta} (DDIM takes eta > 0)")


def make_ddim_timesteps(ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int) -> np.ndarray:
    """Return the training timesteps that a DDIM walk visits, ascending, int64.

    "uniform" strides by N // S. An S that does not divide N gives more steps than S, up to twice as many (N = 1000:
    340 gives 500, and 501..999 give 1000). "quad" spaces the square roots evenly over the first 80 % of the N steps.
    Steps count from 1, as the released checkpoints expect; a last step beyond N - 1 is clamped to it.
    """
    S, N = num_ddim_timesteps, num_ddpm_timesteps
    check_steps(S, N)
    if ddim_discr_method == "uniform":
        steps = np.arange(0, N, N // S)
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, np.sqrt(0.8 * N), S) ** 2).astype(np.int64)
    else:
        raise ValueError(f'DDIM discretisation must be "uniform" or "quad", got {ddim_discr_method!r}')
    return np.minimum(steps + 1, N - 1)


def make_ddim_sampling_parameters(
    alphacums: Tensor, ddim_timesteps: np.ndarray, eta: float
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return (sigmas, alphas, alphas_prev) at `ddim_timesteps`; these "alphas" are the papers' alpha-bar.

    `alphacums` is the float32 CPU tensor [N] of all alpha-bar. The walk ends at alphacums[0], not at 1.
    `eta` in [0, 1] scales the noise put back at each step: 0 is DDIM, 1 is DDPM (DDIM eq. 16).
    """
    check_eta(eta)
    alpha_bar = alphacums.numpy()
    alphas = alpha_bar[ddim_timesteps]
    # Python floats make this float64. A table of one step contains none of them and stays float32, as published.
    alphas_prev = np.asarray([alpha_bar[0], *alphas[:-1].tolist()])
    # The reciprocal is rounded to float32 and the roots are NumPy's, which gives the published tables bit for bit.
    sigmas = eta * np.sqrt((1 - alphas_prev) * (1 / (1 - alphas)) * (1 - alphas / alphas_prev))
    return torch.from_numpy(sigmas), torch.from_numpy(alphas), alphas_prev


# --- conditioning and guidance -----------------------------------------------------------------------------


def _leaves(conditioning: Conditioning) -> Iterator[Tensor]:
    """Yield the tensors of a conditioning, however nested."""
    if isinstance(conditioning, Tensor):
        yield conditioning
    elif isinstance(conditioning, dict):
        for value in conditioning.values():
            yield from _leaves(value)
    elif isinstance(conditioning, list | tuple):
        for value in conditioning:
            yield from _leaves(value)
    else:
        raise ValueError(
            f"conditioning must be a tensor, or a list or dict of tensors, got {type(conditioning).__name__}"
        )


def _check_batch(conditioning: Conditioning, batch_size: int, what: str) -> None:
    for c in _leaves(conditioning):
        if c.ndim == 0 or c.shape[0] != batch_size:
            raise ValueError(
                f"{what} of shape {tuple(c.shape)} does not fit {batch_size} picture(s): give one row a picture"
            )


def _join(first: Conditioning, second: Conditioning) -> Conditioning:
    """Concatenate two conditionings of the same structure along the batch."""
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: _join(first[key], second[key]) for key in first}
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return [_join(a, b) for a, b in zip(first, second, strict=True)]
    raise ValueError("unconditional and conditional conditioning must have the same structure and shapes")


def guided(
    model: Any, batch_size: int, conditioning: Conditioning, unconditional: Conditioning, scale: float
) -> PredictEps:
    """Wrap `model.apply_model` into `predict_eps(x, t)` with classifier-free guidance (Ho & Salimans 2022).

    eps = eps_u + scale * (eps_c - eps_u), both from one call with the batch [unconditional; conditional].
    With scale 1, or without an unconditional conditioning, the model is called once, without guidance. The model
    gets an int t as int64 [B] and a float t as float32 [B]; eps is returned in the dtype of x.
    Raises ValueError for a conditioning that does not have `batch_size` rows.
    """

    def call_model(x: Tensor, t: int | float, c: Conditioning) -> Tensor:
        dtype = torch.float32 if isinstance(t, float) else torch.int64
        ts = torch.full((x.shape[0],), t, device=x.device, dtype=dtype)
        return model.apply_model(x, ts, c).to(x.dtype)

    if conditioning is not None:
        _check_batch(conditioning, batch_size, "conditioning")
    if scale == 1 or unconditional is None:
        return lambda x, t: call_model(x, t, conditioning)

    _check_batch(unconditional, batch_size, "unconditional conditioning")
    both = _join(unconditional, conditioning)

    def predict_eps(x: Tensor, t: int | float) -> Tensor:
        eps_u, eps_c = call_model(torch.cat([x, x]), t, both).chunk(2)
        return eps_u + scale * (eps_c - eps_u)

    return predict_eps


# --- noise -------------------------------------------------------------------------------------------------


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per picture, so that its noise depends on its own seed and not on its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(batch_shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Draw standard normal noise [B, C, H, W] on the CPU, so that every device gets the same, and move it to `device`.

    `generator`: one for the whole batch, a sequence with one per picture, or None for torch's global one.
    Raises ValueError if a sequence does not have B generators.
    """
    randn = partial(torch.randn, dtype=torch.float32, device="cpu")
    if generator is None or isinstance(generator, torch.Generator):
        return randn(*batch_shape, generator=generator).to(device)
    if len(generator) != batch_shape[0]:
        raise ValueError(f"got {len(generator)} generators for {batch_shape[0]} picture(s): give one for each")
    return torch.stack([randn(*batch_shape[1:], generator=g) for g in generator]).to(device)


def keep_known(mask: Tensor | None, x0: Tensor | None, batch_shape: Sequence[int], noise: DrawNoise) -> KeepKnown:
    """Return the function that restores the known region before each step of inpainting.

    Where `mask` is 1 it replaces x_t by x0 at the noise level of x_t; elsewhere it leaves x_t. Without a mask it
    leaves x_t everywhere. Raises ValueError unless both are None, or both broadcast to `batch_shape` [B, C, H, W].
    """
    if mask is None and x0 is None:
        return lambda x, alpha_bar: x
    if mask is None or x0 is None:
        raise ValueError("inpainting needs both mask and x0, got only one of them")
    for name, value in (("mask", mask), ("x0", x0)):
        wanted = batch_shape[-value.ndim :] if value.ndim else ()
        if value.ndim > 4 or any(n not in (1, m) for n, m in zip(value.shape, wanted, strict=False)):
            raise ValueError(f"{name} of shape {tuple(value.shape)} does not broadcast to {tuple(batch_shape)}")

    def keep(x: Tensor, alpha_bar: float) -> Tensor:
        known = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise()
        return mask * known + (1 - mask) * x

    return keep


# --- the walk ----------------------------------------------------------------------------------------------


def check_batch_shape(batch_size: int, shape: Sequence[int], x_T: Tensor | None) -> tuple[int, ...]:
    """Return (B, C, H, W). Raise ValueError unless all are 1 or more, and x_T, if given, has this shape."""
    batch_shape = (batch_size, *shape)
    if len(batch_shape) != 4 or not all(isinstance(n, int) and n >= 1 for n in batch_shape):
        raise ValueError(f"batch_size must be 1 or more and shape (C, H, W), got {batch_size} and {tuple(shape)}")
    if x_T is not None and tuple(x_T.shape) != batch_shape:
        raise ValueError(f"x_T must have shape {batch_shape}, got {tuple(x_T.shape)}")
    return batch_shape


class Sampler:
    """A sampler without its update rule, which subclasses give in `schedule`, `_prepare` and `_steps`.

    `model` needs `apply_model(x [B, C, H, W], t [B], conditioning) -> eps`, `alphas_cumprod` [N],
    `num_timesteps` (N) and `device`.
    """

    name = "sampler"

    def __init__(self, model: Any):
        self.model = model
        self.alphas_cumprod = model.alphas_cumprod.detach().float().cpu()

    def schedule(self, S: int, eta: float = 0.0) -> list[int | float]:
        """Return the times at which `sample(S, ..., eta=eta)` calls the model, in the order of the calls.

        Times are int where the model gets int64, float where it gets float32. Raises ValueError as `sample` does.
        """
        raise NotImplementedError

    def _prepare(self, S: int, eta: float) -> int:
        """Compute the tables for S steps; return how many steps the walk takes."""
        raise NotImplementedError

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        """Walk the last `n_steps` steps of the prepared tables from x, and yield after each."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        *,
        eta: float = 0.0,
        x_T: Tensor | None = None,
        verbose: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        generator: Generators = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw `batch_size` latents of `shape` (C, H, W) in S steps, S in 1..N.

        conditioning, unconditional_conditioning: tensor [B, T, D], or a list or dict of tensors, with one row per
            picture. Guidance with `unconditional_guidance_scale` applies if both are given and the scale is not 1.
        eta: share of DDPM's noise that each step puts back, in [0, 1]; samplers other than DDIM take only 0.
        x_T: [B, C, H, W] to start from; drawn from `generator` if None.
        generator: the source of noise. A sequence of one CPU generator per picture (`seeded_generators`) makes each
            picture independent of its batch; None is torch's global generator.
        mask, x0: for inpainting, both broadcastable to [B, C, H, W]; x0 is kept where mask is 1.
        callback(i), img_callback(pred_x0, i): called once per step, i = 0, 1, ...
        verbose: show a progress bar.

        Returns (samples [B, C, H, W], {"x_inter": [...], "pred_x0": [...]}). The lists of x and predicted x_0 hold
        x_T, the first step, and every `log_every_t`-th step counted back from the end. Raises ValueError for bad
        input.
        """
        batch_shape = check_batch_shape(batch_size, shape, x_T)
        if log_every_t < 1:
            raise ValueError(f"log_every_t must be 1 or more, got {log_every_t}")
        n_steps = self._prepare(S, eta)
        predict_eps = guided(
            self.model, batch_size, conditioning, unconditional_conditioning, unconditional_guidance_scale
        )
        noise = partial(draw_noise, batch_shape, generator, self.model.device)
        keep = keep_known(mask, x0, batch_shape, noise)
        x = noise() if x_T is None else x_T.to(self.model.device)

        inter: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        steps = self._steps(predict_eps, x, n_steps, noise, keep)
        for i, (x, pred_x0) in enumerate(self._progress(steps, n_steps, verbose)):
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(pred_x0, i)
            if i == 0 or (n_steps - 1 - i) % log_every_t == 0:
                inter["x_inter"].append(x)
                inter["pred_x0"].append(pred_x0)
        return x, inter

    def _progress(self, steps: Iterator[Step], n_steps: int, verbose: bool) -> Iterator[Step]:
        """Yield the steps and show a bar, which stays on the screen unless it is inside another bar."""
        return iter(tqdm(steps, self.name, n_steps, leave=None, unit="step", disable=not verbose))
