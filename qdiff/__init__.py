"""Few-bit weights and activations for diffusion UNets (Q-Diffusion, Li et al. 2023).

The names below are imported from their modules at first use: running a calibrated model needs no calibration code, and
reading a setting needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdiff.adaptive_rounding import AdaRoundQuantizer
    from qdiff.checkpoint import load_cali_ckpt, save_cali_ckpt
    from qdiff.config import QuantConfig, ReconConfig
    from qdiff.quant_block import BaseQuantBlock
    from qdiff.quant_layer import QuantModule
    from qdiff.quant_model import QuantModel
    from qdiff.quantizers import UniformAffineQuantizer
    from qdiff.reconstruction import block_reconstruction, layer_reconstruction

_MODULES = {
    "AdaRoundQuantizer": "adaptive_rounding",
    "BaseQuantBlock": "quant_block",
    "QuantConfig": "config",
    "QuantModel": "quant_model",
    "QuantModule": "quant_layer",
    "ReconConfig": "config",
    "UniformAffineQuantizer": "quantizers",
    "block_reconstruction": "reconstruction",
    "layer_reconstruction": "reconstruction",
    "load_cali_ckpt": "checkpoint",
    "save_cali_ckpt": "checkpoint",
}

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


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'qdiff' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"qdiff.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
