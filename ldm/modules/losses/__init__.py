"""Training objectives of the autoencoder, by the target paths of the configs."""

from ldm.modules.losses.reconstruction import ReconstructionLoss

__all__ = ["ReconstructionLoss"]
