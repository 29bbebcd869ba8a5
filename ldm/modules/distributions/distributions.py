"""The distribution of latents that the autoencoder predicts for a picture."""

from collections.abc import Sequence

import torch


class DiagonalGaussianDistribution:
    """Gaussian with diagonal covariance, from its moments [B, 2C, H, W] = (mean, log variance).

    The log variance is clamped to [-30, 20]. `deterministic` sets the variance to zero.
    """

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.var = torch.zeros_like(self.mean) if deterministic else self.logvar.exp()
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()

    def sample(self, noise: torch.Tensor | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return mean + std * noise [B, C, H, W]. Noise is drawn on the CPU, so that a seed is the same everywhere."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> torch.Tensor:
        """Return the most likely latents [B, C, H, W], which are the mean."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> torch.Tensor:
        """Return the Kullback-Leibler divergence [B] to `other`, or to the standard normal."""
        if self.deterministic:
            return torch.zeros(self.mean.shape[0], device=self.mean.device)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0
            terms = terms - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=[1, 2, 3])

    def nll(self, sample: torch.Tensor, dims: Sequence[int] = (1, 2, 3)) -> torch.Tensor:
        """Return the negative log-likelihood of `sample` [B, C, H, W], summed over `dims`."""
        log_two_pi = 1.8378770664093453
        terms = log_two_pi + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=tuple(dims))
