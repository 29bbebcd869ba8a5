"""The reconstruction objective of the embedded model's autoencoder."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class ReconstructionLoss(nn.Module):
    """L1 between pictures, L1 between their gradients at several scales (for sharp edges), and a small KL term.

    There is no perceptual loss, because drawn shapes have no fine texture for it to judge.
    """

    def __init__(self, kl_weight: float = 1e-6, edge_weight: float = 1.0, edge_scales: int = 3):
        super().__init__()
        self.kl_weight = kl_weight
        self.edge_weight = edge_weight
        self.edge_scales = edge_scales

    def forward(
        self, inputs: torch.Tensor, reconstructions: torch.Tensor, posterior: DiagonalGaussianDistribution
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return (scalar loss, its parts by name) of pictures [B, 3, H, W] in [-1, 1] and their reconstructions."""
        loss, parts = self.compare(inputs, reconstructions)
        kl = posterior.kl().mean()
        return loss + self.kl_weight * kl, {**parts, "kl_loss": kl.detach()}

    def compare(
        self, inputs: torch.Tensor, reconstructions: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the same without the KL term, for a decoder alone."""
        difference = (reconstructions - inputs).float()
        l1 = difference.abs().mean()
        edges = self._edges(difference)
        return l1 + self.edge_weight * edges, {"rec_loss": l1.detach(), "edge_loss": edges.detach()}

    def _edges(self, difference: torch.Tensor) -> torch.Tensor:
        total = difference.new_zeros(())
        for _ in range(self.edge_scales):
            total = total + difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
            difference = F.avg_pool2d(difference, 2)
        return total
