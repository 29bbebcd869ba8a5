"""Latent diffusion: the noise process, its training objective, and the three networks behind one interface."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from ldm.compat import check_neutral
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config

# Arguments of CompVis's LatentDiffusion that have no effect here, at the only values that are accepted.
NEUTRAL = {
    "ckpt_path": None,
    "ignore_keys": (),
    "load_only_unet": False,
    "concat_mode": True,
    "cond_stage_forward": None,
    "scale_by_std": False,
    "clip_denoised": True,
    "given_betas": None,
    "original_elbo_weight": 0.0,
    "l_simple_weight": 1.0,
    "learn_logvar": False,
    "logvar_init": 0.0,
    "use_positional_encodings": False,
}


NEARLY_ZERO = 2.0**-24  # the last alpha_bar of a schedule that ends in noise alone


def with_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Return the betas [T] of a schedule whose last alpha_bar is NEARLY_ZERO (Lin et al. 2023, algorithm 1).

    sqrt(alpha_bar) is shifted and scaled, so that its first value stays.
    """
    root = np.sqrt(np.cumprod(1.0 - betas))
    alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alphas_cumprod[-1] = NEARLY_ZERO
    return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def checked_focus(focus: Sequence[float], timesteps: int) -> tuple[int, int, float]:
    """Return a `focus` of LatentDiffusion as (first, last, share). Raise ValueError for one that cannot be."""
    if len(focus) != 3 or not 0 <= focus[0] <= focus[1] < timesteps or not 0 < focus[2] <= 1:
        raise ValueError(
            f"focus {list(focus)} must be two timesteps of 0..{timesteps - 1} in their order, and a share in (0, 1]"
        )
    return int(focus[0]), int(focus[1]), float(focus[2])


class DiffusionWrapper(nn.Module):
    """Pass the conditioning to the UNet as its context (`conditioning_key` "crossattn"), or not at all (None)."""

    def __init__(self, unet_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in (None, "crossattn"):
            raise ValueError(f"conditioning_key {conditioning_key!r} is not supported: use crossattn or null")
        self.diffusion_model = instantiate_from_config(unet_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_crossattn: Sequence[torch.Tensor] | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return eps [B, C, h, w]; several contexts [B, M, D] are joined along M.

        guidance: scales [B], for a UNet with `time_cond_proj_dim`.
        """
        further = {} if guidance is None else {"guidance": guidance}
        if self.conditioning_key is None:
            return self.diffusion_model(x, t, **further)
        if not c_crossattn:
            raise ValueError("this model needs a context: pass c_crossattn")
        # A single context is passed on as the same object, by which a model may recognise it in the next step.
        context = c_crossattn[0] if len(c_crossattn) == 1 else torch.cat(list(c_crossattn), dim=1)
        return self.diffusion_model(x, t, context=context, **further)


def _check_prediction(parameterization: str, rescale_betas_zero_snr: bool, num_timesteps_cond: int) -> None:
    if rescale_betas_zero_snr and parameterization != "v":
        raise ValueError("rescale_betas_zero_snr needs parameterization v: noise alone tells no eps apart")
    if parameterization not in ("eps", "v"):
        raise ValueError(f"parameterization {parameterization!r} is not supported: a UNet predicts eps or v")
    if num_timesteps_cond != 1:
        raise ValueError(f"num_timesteps_cond is {num_timesteps_cond}: only 1 (conditioning without noise) works")


def _check_loss(loss_type: str, loss_weight: str, max_loss_weight: float | None) -> None:
    if loss_type not in ("l1", "l2"):
        raise ValueError(f"loss_type {loss_type!r} is unknown: use l1 or l2")
    if loss_weight not in ("uniform", "min_snr", "debiased"):
        raise ValueError(f"loss_weight {loss_weight!r} is unknown: use uniform, min_snr or debiased")
    if max_loss_weight is not None and loss_weight != "debiased":
        raise ValueError(f"max_loss_weight has no effect on the loss_weight {loss_weight!r}: leave it out")


class LatentDiffusion(nn.Module):
    """A diffusion model on the latents of a first stage, conditioned on text (Rombach et al. 2022).

    The names and arguments are those of CompVis's configs. Notation is DDPM's (Ho et al. 2020): the model predicts
    eps in x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, for t in 0..timesteps-1.

    parameterization: the output of the UNet, "eps" or "v" = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans
        & Ho 2022). `apply_model` returns eps for both, so that samplers need not know.
    scale_factor: factor that brings latents to about unit variance.
    cond_stage_trainable: train the text encoder too.
    unconditional_rate: share of captions that training replaces by "", which guidance needs; in [0, 1].
    use_ema, ema_decay: keep averaged weights (`model_ema`) beside the trained ones.
    loss_weight: weight of the loss at t, with SNR_t = alpha_bar_t / (1 - alpha_bar_t). "uniform" is DDPM's. "min_snr"
        is min(SNR_t, `snr_gamma`) / SNR_t (Hang et al. 2023). "debiased" is 1 / sqrt(SNR_t) (Yu et al. 2023), scaled
        to mean 1: it gives more weight to the noisy steps, which decide what is drawn, and where.
    max_loss_weight: weights of "debiased" are cut here before they are scaled; None: not cut.
    focus: (first, last, share): this share of the timesteps that training draws lies in first..last, the others
        anywhere; None: all lie anywhere.
    rescale_betas_zero_snr: rescale the schedule so that x_t is noise alone at the last timestep (Lin et al.,
        arXiv:2305.08891), but for an alpha_bar of NEARLY_ZERO, so that no sampler divides by zero.
    num_timesteps_cond, log_every_t, image_size, monitor, scheduler_config: how a checkpoint was trained; kept as
        attributes.
    neutral: the other arguments of CompVis's class, accepted only at the values that change nothing.

    Only what Stable Diffusion v1 and its fine-tunes need is implemented; values that ask for more raise ValueError.
    """

    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    alphas_cumprod_prev: torch.Tensor
    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    log_one_minus_alphas_cumprod: torch.Tensor
    sqrt_recip_alphas_cumprod: torch.Tensor
    sqrt_recipm1_alphas_cumprod: torch.Tensor
    posterior_variance: torch.Tensor
    posterior_log_variance_clipped: torch.Tensor
    posterior_mean_coef1: torch.Tensor
    posterior_mean_coef2: torch.Tensor

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        v_posterior: float = 0.0,
        loss_type: str = "l2",
        parameterization: str = "eps",
        num_timesteps_cond: int = 1,
        log_every_t: int = 100,
        first_stage_key: str = "image",
        cond_stage_key: str = "caption",
        image_size: int = 256,
        channels: int = 3,
        conditioning_key: str | None = "crossattn",
        cond_stage_trainable: bool = False,
        monitor: str | None = None,
        scale_factor: float = 1.0,
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        unconditional_rate: float = 0.0,
        loss_weight: str = "uniform",
        snr_gamma: float = 5.0,
        max_loss_weight: float | None = None,
        focus: Sequence[float] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        rescale_betas_zero_snr: bool = False,
        **neutral: Any,
    ) -> None:
        super().__init__()
        check_neutral(type(self), neutral, NEUTRAL)
        _check_prediction(parameterization, rescale_betas_zero_snr, num_timesteps_cond)
        _check_loss(loss_type, loss_weight, max_loss_weight)
        self.schedule = (beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.rescale_betas_zero_snr = rescale_betas_zero_snr
        self.num_timesteps = timesteps
        self.v_posterior = v_posterior
        self.loss_type = loss_type
        self.parameterization = parameterization
        self.num_timesteps_cond = num_timesteps_cond
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.image_size = image_size
        self.channels = channels
        self.cond_stage_trainable = cond_stage_trainable
        self.monitor = monitor
        self.scale_factor = scale_factor
        self.use_ema = use_ema
        self.unconditional_rate = unconditional_rate
        self.loss_weight = loss_weight
        self.snr_gamma = snr_gamma
        self.max_loss_weight = max_loss_weight
        self.focus = None if focus is None else checked_focus(focus, timesteps)
        self.scheduler_config = scheduler_config

        self.register_schedule()
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if not cond_stage_trainable:
            self.cond_stage_model.eval().requires_grad_(False)
        if use_ema:
            self.model_ema = LitEma(self.model, decay=ema_decay)
            if cond_stage_trainable:
                self.cond_stage_ema = LitEma(self.cond_stage_model, decay=ema_decay)

    @property
    def device(self) -> torch.device:
        """The device of the noise schedule, which moves with the model."""
        return self.betas.device

    # --- the noise process -------------------------------------------------------------------------------

    def register_schedule(self) -> None:
        """Compute the 12 buffers of the noise process from the config, in float64, and keep them as float32."""
        betas = make_beta_schedule(*self.schedule).numpy()
        if self.rescale_betas_zero_snr:
            betas = with_zero_terminal_snr(betas)
        alphas_cumprod = np.cumprod(1.0 - betas)
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        # DDPM eq. 7; v_posterior mixes it with the upper bound beta_t.
        posterior_variance = (1 - self.v_posterior) * betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        posterior_variance = posterior_variance + self.v_posterior * betas
        tables = {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
            "log_one_minus_alphas_cumprod": np.log(1.0 - alphas_cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod - 1),
            "posterior_variance": posterior_variance,
            # The logarithm is clipped because the variance is 0 at t = 0.
            "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
            "posterior_mean_coef2": (1.0 - alphas_cumprod_prev) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32, device="cpu"))

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return x_t for x_0 [B, C, h, w] at t [B] (DDPM eq. 4)."""
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.ndim) * x_start
            + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.ndim) * noise
        )

    def predict_start_from_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return x_0 from x_t and its noise: the inverse of q_sample."""
        return (
            extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.ndim) * x_t
            - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.ndim) * noise
        )

    def get_v(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 of x_0 [B, C, h, w], noise and t [B]."""
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, x.ndim) * noise
            - extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x.ndim) * x
        )

    def predict_eps_from_v(self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t; between timesteps, log alpha_bar is linear."""
        log_alpha_bar = self.alphas_cumprod.double().log()
        before = t.long().clamp(max=self.num_timesteps - 1)
        after = (before + 1).clamp(max=self.num_timesteps - 1)
        log_alpha_bar = torch.lerp(log_alpha_bar[before], log_alpha_bar[after], t.double() - before)
        alpha, sigma = (log_alpha_bar / 2).exp(), (-log_alpha_bar.expm1()).sqrt()
        alpha, sigma = (scale.to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1)) for scale in (alpha, sigma))
        return alpha * v + sigma * x_t

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7)."""
        mean = (
            extract_into_tensor(self.posterior_mean_coef1, t, x_t.ndim) * x_start
            + extract_into_tensor(self.posterior_mean_coef2, t, x_t.ndim) * x_t
        )
        variance = extract_into_tensor(self.posterior_variance, t, x_t.ndim)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.ndim)

    # --- the networks ------------------------------------------------------------------------------------

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        """Return eps [B, C, h, w] for x_t [B, C, h, w], t [B] and the context [B, M, D].

        The context may also be wrapped as in CompVis's code: a list of tensors, or {"c_crossattn": list}, to which
        "guidance" (scales [B]) is added for a UNet with `time_cond_proj_dim`.
        """
        output = self._call_unet(x_noisy, t, cond)
        return output if self.parameterization == "eps" else self.predict_eps_from_v(x_noisy, t, output)

    def _call_unet(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        """Return the output of the UNet: eps or v. Arguments as in `apply_model`."""
        if isinstance(cond, dict):
            return self.model(x_noisy, t, **cond)
        return self.model(x_noisy, t, c_crossattn=cond if isinstance(cond, list | tuple) else [cond])

    def get_learned_conditioning(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the context [B, M, D] of B prompts."""
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        return encode(prompts)

    def encode_first_stage(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior over unscaled latents of pictures [B, 3, H, W] in [-1, 1]."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, posterior: DiagonalGaussianDistribution | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return scaled latents [B, C, h, w], of a sample of the posterior or of given latents."""
        z = posterior.sample(noise) if isinstance(posterior, DiagonalGaussianDistribution) else posterior
        return self.scale_factor * z

    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        """Return the pictures [B, 3, H, W] of scaled latents [B, C, h, w], about [-1, 1] and not clamped."""
        return self.first_stage_model.decode(z / self.scale_factor)

    # --- the objective -----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Set the mode of the trained networks; those that are frozen stay in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return scaled latents of a batch, from its "moments" [B, 2C, h, w] or else its pictures [B, H, W, 3]."""
        if "moments" in batch:
            posterior = DiagonalGaussianDistribution(batch["moments"].float())
        else:
            posterior = self.encode_first_stage(batch[self.first_stage_key].permute(0, 3, 1, 2).contiguous())
        return self.get_first_stage_encoding(posterior).detach()

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the training loss of a batch, a scalar, for timesteps and noise drawn at random."""
        x_start = self.get_input(batch)
        t = self._draw_timesteps(len(x_start)).to(x_start.device)
        context = self.get_learned_conditioning(self._drop_captions(batch[self.cond_stage_key]))
        return self.p_losses(x_start, context, t, torch.randn_like(x_start))

    def _draw_timesteps(self, n: int) -> torch.Tensor:
        """Draw n timesteps: all alike, or in training with the model's focus."""
        anywhere = torch.randint(self.num_timesteps, (n,))
        if self.focus is None or not self.training:
            return anywhere
        first, last, share = self.focus
        return torch.where(torch.rand(n) < share, torch.randint(first, last + 1, (n,)), anywhere)

    def _drop_captions(self, captions: Sequence[str]) -> list[str]:
        if not (self.training and self.unconditional_rate):
            return list(captions)
        dropped = torch.rand(len(captions)) < self.unconditional_rate
        return ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]

    def p_losses(self, x_start: torch.Tensor, cond: Any, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the weighted error of the UNet's output (DDPM eq. 14 for eps), averaged over the batch."""
        prediction = self._call_unet(self.q_sample(x_start, t, noise), t, cond).float()
        target = noise if self.parameterization == "eps" else self.get_v(x_start, noise, t)
        distance = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        error = distance(prediction, target, reduction="none").mean(dim=[1, 2, 3])
        return (error * self._loss_weight(t)).mean()

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        if self.loss_weight == "uniform":
            return torch.ones_like(t, dtype=torch.float32)
        if self.parameterization == "v":
            raise ValueError(f"loss_weight {self.loss_weight!r} is for models that predict eps: use uniform for v")
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        if self.loss_weight == "min_snr":
            return (snr.clamp(max=self.snr_gamma) / snr)[t]
        weight = snr.rsqrt()
        if self.max_loss_weight is not None:
            weight = weight.clamp(max=self.max_loss_weight)
        return (weight / weight.mean())[t]

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Use the averaged weights, if there are any, within the block; restore the trained ones afterwards."""
        if not self.use_ema:
            yield
        elif not self.cond_stage_trainable:
            with self.model_ema.average_parameters(self.model):
                yield
        else:
            with (
                self.model_ema.average_parameters(self.model),
                self.cond_stage_ema.average_parameters(self.cond_stage_model),
            ):
                yield
