"""Latent diffusion: the noise process, its training objective, and the three networks behind one interface."""

from collections.abc import Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn as nn
import torch.nn.functional as F

from ldm.compat import check_neutral
from ldm.lr_scheduler import with_scheduler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config

# Arguments of CompVis's LatentDiffusion that we know and do not need, at the values that change nothing.
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


class DiffusionWrapper(nn.Module):
    """Hands the conditioning to the UNet: as context (`conditioning_key` "crossattn"), or not at all (None)."""

    def __init__(self, unet_config: dict, conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in (None, "crossattn"):
            raise ValueError(f"conditioning_key {conditioning_key!r} is not supported: use crossattn or null")
        self.diffusion_model = instantiate_from_config(unet_config)
        self.conditioning_key = conditioning_key

    def forward(self, x: torch.Tensor, t: torch.Tensor, c_crossattn: Sequence[torch.Tensor] | None = None):
        if self.conditioning_key is None:
            return self.diffusion_model(x, t)
        # One context stays the object that it is: a model may know it again in the next step.
        context = c_crossattn[0] if len(c_crossattn) == 1 else torch.cat(list(c_crossattn), dim=1)
        return self.diffusion_model(x, t, context=context)


class LatentDiffusion(pl.LightningModule):
    """A diffusion model on the latents of a first stage, conditioned on text (Rombach et al. 2022).

    The names and arguments are those of CompVis's configs. Notation is DDPM's (Ho et al. 2020): the model predicts
    eps in x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, for t in 0..timesteps-1.

    `scale_factor` brings latents to about unit variance. `cond_stage_trainable` trains the text encoder too;
    `unconditional_rate` is the share of captions replaced by "" in training, which guidance needs;
    `loss_weight` weights the loss at t, with SNR_t = alpha_bar_t / (1 - alpha_bar_t): "uniform" as DDPM; "min_snr" by
    min(SNR_t, `snr_gamma`) / SNR_t (Hang et al. 2023); "debiased" by 1 / sqrt(SNR_t) (Yu et al. 2023), scaled to mean
    1: more weight on the noisy steps, where what and where things are is decided.
    `num_timesteps_cond`, `log_every_t`, `image_size` and `monitor` describe how a checkpoint was trained; they are
    kept as attributes. Only what the noise prediction of SD v1 needs is here: other values raise ValueError, and the
    remaining arguments of CompVis's class (`neutral`) are accepted only at the values that change nothing.
    """

    def __init__(
        self,
        first_stage_config: dict,
        cond_stage_config: dict,
        unet_config: dict,
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
        scheduler_config: dict | None = None,
        **neutral,
    ):
        super().__init__()
        check_neutral(type(self), neutral, NEUTRAL)
        if parameterization != "eps":
            raise ValueError(f"parameterization {parameterization!r} is not supported: this model predicts eps")
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type {loss_type!r} is unknown: use l1 or l2")
        if loss_weight not in ("uniform", "min_snr", "debiased"):
            raise ValueError(f"loss_weight {loss_weight!r} is unknown: use uniform, min_snr or debiased")
        if num_timesteps_cond != 1:
            raise ValueError(f"num_timesteps_cond is {num_timesteps_cond}: only 1 (conditioning without noise) works")
        self.schedule = (beta_schedule, timesteps, linear_start, linear_end, cosine_s)
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
        self.scheduler_config = scheduler_config
        self.learning_rate = 1e-4  # scripts/train.py sets the config's base_learning_rate

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

    # --- the noise process -------------------------------------------------------------------------------

    def register_schedule(self) -> None:
        """(Re)computes the 12 buffers of the noise process from the config: in float64, kept as float32."""
        betas = make_beta_schedule(*self.schedule).numpy()
        alphas_cumprod = np.cumprod(1.0 - betas)
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        # DDPM eq. 7; v_posterior blends it with the upper bound beta_t.
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
            # The variance is 0 at t = 0: its logarithm is clipped.
            "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
            "posterior_mean_coef2": (1.0 - alphas_cumprod_prev) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32, device="cpu"))

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t of x_0 [B, C, h, w] at t [B] (DDPM eq. 4)."""
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.ndim) * x_start
            + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.ndim) * noise
        )

    def predict_start_from_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The inverse of q_sample: x_0 from x_t and its noise."""
        return (
            extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.ndim) * x_t
            - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.ndim) * noise
        )

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7)."""
        mean = (
            extract_into_tensor(self.posterior_mean_coef1, t, x_t.ndim) * x_start
            + extract_into_tensor(self.posterior_mean_coef2, t, x_t.ndim) * x_t
        )
        variance = extract_into_tensor(self.posterior_variance, t, x_t.ndim)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.ndim)

    # --- the networks ------------------------------------------------------------------------------------

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond) -> torch.Tensor:
        """eps [B, C, h, w] for x_t [B, C, h, w], t [B] and context [B, M, D].

        The context may also come in CompVis's wrappings: a list of tensors, or {"c_crossattn": list}.
        """
        if isinstance(cond, dict):
            return self.model(x_noisy, t, **cond)
        return self.model(x_noisy, t, c_crossattn=cond if isinstance(cond, list | tuple) else [cond])

    def get_learned_conditioning(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> context [B, M, D]."""
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        return encode(prompts)

    def encode_first_stage(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """Pictures [B, 3, H, W] in [-1, 1] -> the posterior over unscaled latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, posterior: DiagonalGaussianDistribution | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scaled latents: a sample of the posterior, or a latent as it is."""
        z = posterior.sample(noise) if isinstance(posterior, DiagonalGaussianDistribution) else posterior
        return self.scale_factor * z

    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, C, h, w] -> pictures [B, 3, H, W], about [-1, 1] and not clamped."""
        return self.first_stage_model.decode(z / self.scale_factor)

    # --- training ----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "LatentDiffusion":
        super().train(mode)
        self.first_stage_model.eval()
        if not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    @torch.no_grad()
    def get_input(self, batch: dict) -> torch.Tensor:
        """Scaled latents of a batch: from its cached "moments" [B, 2C, h, w], or from its pictures [B, H, W, 3]."""
        if "moments" in batch:
            posterior = DiagonalGaussianDistribution(batch["moments"].float())
        else:
            posterior = self.encode_first_stage(batch[self.first_stage_key].permute(0, 3, 1, 2).contiguous())
        return self.get_first_stage_encoding(posterior).detach()

    def forward(self, batch: dict) -> torch.Tensor:
        """The training loss of a batch: a scalar."""
        x_start = self.get_input(batch)
        t = torch.randint(self.num_timesteps, (len(x_start),), device=x_start.device)
        context = self.get_learned_conditioning(self._drop_captions(batch[self.cond_stage_key]))
        return self.p_losses(x_start, context, t, torch.randn_like(x_start))

    def _drop_captions(self, captions: Sequence[str]) -> list[str]:
        if not (self.training and self.unconditional_rate):
            return list(captions)
        dropped = torch.rand(len(captions)) < self.unconditional_rate
        return ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]

    def p_losses(self, x_start: torch.Tensor, cond, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Weighted error of the predicted noise (DDPM eq. 14), averaged over the batch."""
        prediction = self.apply_model(self.q_sample(x_start, t, noise), t, cond).float()
        distance = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        error = distance(prediction, noise, reduction="none").mean(dim=[1, 2, 3])
        return (error * self._loss_weight(t)).mean()

    def _loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        if self.loss_weight == "uniform":
            return torch.ones_like(t, dtype=torch.float32)
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        if self.loss_weight == "min_snr":
            return (snr.clamp(max=self.snr_gamma) / snr)[t]
        weight = snr.rsqrt()
        return (weight / weight.mean())[t]

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        loss = self(batch)
        self.log("train/loss_simple", loss.detach(), prog_bar=True)
        return loss

    def on_train_batch_end(self, *_) -> None:
        if self.use_ema:
            self.model_ema(self.model)
            if self.cond_stage_trainable:
                self.cond_stage_ema(self.cond_stage_model)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)  # the same noise each time, so that losses can be compared
            with self.ema_scope():
                self.log("val/loss_simple_ema", self(batch), prog_bar=True, batch_size=len(batch[self.cond_stage_key]))

    @contextmanager
    def ema_scope(self):
        """Within the block the averaged weights are in use (if there are any); afterwards the own ones again."""
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

    @torch.no_grad()
    def log_images(self, batch: dict, n: int = 16, steps: int = 25, scale: float = 4.0) -> dict[str, torch.Tensor]:
        """Pictures [n, 3, H, W] drawn from the batch's captions with guidance, always from the same noise."""
        captions = list(batch[self.cond_stage_key])[:n]
        n = len(captions)
        with self.ema_scope():
            samples, _ = DDIMSampler(self).sample(
                steps,
                n,
                tuple(self.get_input(batch).shape[1:]),
                conditioning=self.get_learned_conditioning(captions),
                unconditional_conditioning=self.get_learned_conditioning([""] * n),
                unconditional_guidance_scale=scale,
                generator=torch.Generator().manual_seed(0),
                verbose=False,
            )
        return {"samples": self.decode_first_stage(samples)}

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes: the UNet, and the text encoder if it is trainable."""
        cond = self.cond_stage_model.parameters() if self.cond_stage_trainable else ()
        return [p for p in chain(self.model.parameters(), cond) if p.requires_grad]

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.trained_parameters(), lr=self.learning_rate, weight_decay=1e-2)
        return with_scheduler(optimizer, self.scheduler_config)
