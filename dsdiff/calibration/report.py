"""The outcome of a calibration, in lines and as a file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.fileio import write_atomically
from qdiff.reconstruction import UnitReport


def describe(report: UnitReport) -> str:
    """Return a report as a line."""
    verdict = "" if report.improved else " (kept as it was)"
    return (
        f"{report.phase:<11} {report.unit.removeprefix('model.'):<45} "
        f"{report.before:.3e} -> {report.after:.3e}{verdict} {report.seconds:.1f} s"
    )


def describe_mixing(shares: Mapping[str, float], bits: int) -> str:
    """Return which inputs get more bits, as a line. shares: of the error that quantized inputs cause, by name."""
    first = ", ".join(f"{name.removeprefix('model.')} {share:.0%}" for name, share in list(shares.items())[:3])
    return (
        f"{bits} bits for {len(shares)} inputs, {sum(shares.values()):.0%} of the error that quantized inputs cause: "
        f"{first}{' and others' if len(shares) > 3 else ''}"
    )


def summary(reports: Sequence[UnitReport]) -> Iterator[str]:
    """Yield a line for each phase, which says by how much the errors of its units fell."""
    for phase in ("weights", "activations"):
        units = [report for report in reports if report.phase == phase]
        if units:
            ratios = sorted(unit.after / unit.before if unit.before else 1.0 for unit in units)
            yield (
                f"{phase}: {sum(unit.improved for unit in units)} of {len(units)} units improved, error x "
                f"{ratios[len(ratios) // 2]:.2f} (median), {sum(unit.seconds for unit in units):.0f} s"
            )


def write_report(path: Path, facts: Mapping[str, Any], reports: Sequence[UnitReport]) -> None:
    """Write the settings of a calibration and the errors of all units, as JSON."""
    content = json.dumps({"settings": facts, "units": [asdict(report) for report in reports]}, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
