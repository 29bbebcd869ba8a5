"""Few-bit weights and activations for diffusion UNets (Q-Diffusion, Li et al. 2023)."""

from qdiff.adaptive_rounding import AdaRoundQuantizer
from qdiff.checkpoint import load_cali_ckpt, save_cali_ckpt
from qdiff.config import QuantConfig, ReconConfig
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QuantModule, UniformAffineQuantizer
from qdiff.quant_model import QuantModel
from qdiff.reconstruction import block_reconstruction, layer_reconstruction

__all__ = [
    "AdaRoundQuantizer",
    "BaseQuantBlock",
    "QuantConfig",
    "QuantModel",
    "QuantModule",
    "ReconConfig",
    "UniformAffineQuantizer",
    "block_reconstruction",
    "layer_reconstruction",
    "load_cali_ckpt",
    "save_cali_ckpt",
]
