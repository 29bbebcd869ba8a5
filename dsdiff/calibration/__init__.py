"""Calibration: a float model in, the few-bit numbers of its UNet out.

    from dsdiff.calibration import CalibrationOptions, calibrate

    path = calibrate(CalibrationOptions(weight_bit=4, quant_act=True, split=True, cond=True))

Importing this package imports no torch: names are looked up at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsdiff.calibration.options import PRESETS, CalibrationOptions
    from dsdiff.calibration.run import calibrate, ready_made

__all__ = ["PRESETS", "CalibrationOptions", "calibrate", "ready_made"]

_HOMES = {
    "CalibrationOptions": "dsdiff.calibration.options",
    "PRESETS": "dsdiff.calibration.options",
    "calibrate": "dsdiff.calibration.run",
    "ready_made": "dsdiff.calibration.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
