"""Write the report of whole pictures: a table for the terminal and in markdown, JSON, and a plot of stacked bars."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsdiff.benchmark.options import Draw
from dsdiff.benchmark.pictures.figures import PictureReport, RowFigures
from dsdiff.benchmark.pictures.request import PHASES
from dsdiff.benchmark.report import COLOURS, aligned, piped, spread, write_text
from ldm.fileio import write_atomically


def write(report: PictureReport, outdir: Path) -> None:
    """Write pictures.json, pictures.md and pictures.png into outdir."""
    outdir.mkdir(parents=True, exist_ok=True)
    write_text(outdir / "pictures.json", json.dumps(asdict(report), indent=2) + "\n")
    lines = [piped(table(report)), " ".join(facts(report)), "\n".join(f"- {line}" for line in remarks(report))]
    write_text(outdir / "pictures.md", "\n\n".join(filter(None, lines)) + "\n")
    write_atomically(outdir / "pictures.png", lambda path: plot(report, path))


def text(report: PictureReport) -> str:
    """Return the table and remarks for the terminal."""
    return "\n".join([*facts(report), "", *aligned(table(report)), "", *remarks(report)])


def table(report: PictureReport) -> list[list[str]]:
    """Return a line for each row: seconds of its phases, their sum and its ratios to others, memory and files."""
    phases = [{"decoding": "decode", "png": "PNG"}.get(phase, phase) for phase in PHASES]
    ratios = ["x float32", "x openvino-int8"]
    head = ["steps", "by", "ratio", *phases, "total s", *ratios, "peak MB", "files MB"]
    return [head, *(_line(row) for row in report.rows)]


def _line(row: RowFigures) -> list[str]:
    return [
        draw_of(row),
        row.name,
        f"{row.ratio:g}",
        *(f"{row.phases[phase]:.2f}" for phase in PHASES),
        spread(row.total, 4),
        *(spread(speedup, 3) for speedup in (row.speedup, row.speedup_openvino)),
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        f"{row.file_bytes / 1e6:.0f}",
    ]


def draw_of(row: RowFigures) -> str:
    """Return how a row is drawn, and how many of its steps were measured."""
    draw = Draw(sampler=row.sampler, steps=row.steps, scale=row.scale, tiny=row.tiny)
    return f"{draw}" + (f" ({row.measured} measured)" if row.measured < row.steps else "")


def facts(report: PictureReport) -> list[str]:
    """Return sentences on the model, on the machine and on the way of measuring."""
    machine = report.machine
    cpu = f"{machine.get('gpu', machine['cpu'])} ({machine['isa']})"
    return [
        f"{report.model}, pictures of {report.size[0]}x{report.size[1]}.",
        f"{cpu}, {machine['cores']} cores, torch {machine['torch']}; seconds from the start of a process to its PNG on "
        "the disk, files in the system's cache; "
        f"median (least..most) of {report.repeats} fresh processes, ratios within a repeat.",
    ]


def remarks(report: PictureReport) -> list[str]:
    """Return sentences on steps that were not taken, on each engine and peer, and on what was left out."""
    lines = []
    if any(row.measured < row.steps for row in report.rows):
        lines.append("Steps that were not measured count as the median of those that were, the first left out.")
    told = {row.name: row.facts for row in report.rows}
    lines += [f"{name}: {what}." for name, what in told.items()]
    return lines + [f"{name} is left out: {reason}." for name, reason in report.left_out.items()]


# --- plot --------------------------------------------------------------------------------------------------


def plot(report: PictureReport, path: Path) -> None:
    """Plot the seconds of a picture to a PNG: for each way to draw, a bar a row, its phases stacked."""
    draws = list(dict.fromkeys(draw_of(row) for row in report.rows))
    groups = [[row for row in report.rows if draw_of(row) == draw] for draw in draws]
    sizes = [len(group) + 2 for group in groups]
    figure = Figure(figsize=(9, 1 + 0.3 * sum(sizes)), layout="constrained")
    parts = figure.subplots(len(groups), squeeze=False, height_ratios=sizes)[:, 0]
    for axes, draw, group in zip(parts, draws, groups, strict=True):
        _bars(axes, group)
        axes.set_title(draw, fontsize=10, loc="left")
    parts[0].legend(frameon=False, fontsize=8, ncols=len(PHASES), loc="lower right", bbox_to_anchor=(1, 1))
    parts[-1].set_xlabel("seconds a picture; n x: n times as fast as float32 at ratio 0")
    figure.suptitle(" ".join(facts(report)).split(";")[0], fontsize=9)
    figure.savefig(path, format="png", dpi=150)


def _bars(axes: Axes, rows: Sequence[RowFigures]) -> None:
    places, ends = range(len(rows)), [0.0] * len(rows)
    for phase, colour in zip(PHASES, COLOURS, strict=True):
        lengths = [row.phases[phase] for row in rows]
        axes.barh(places, lengths, 0.8, left=ends, color=colour, label=phase)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for place, end, row in zip(places, ends, rows, strict=True):
        speed = "" if row.speedup is None else f", {row.speedup.median:.2g} x"
        label = f"{row.total.median:.3g} s{speed}"
        axes.annotate(label, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, [f"{row.name}, ratio {row.ratio:g}" for row in rows], fontsize=8)
    axes.set_xlim(0, 1.25 * max(ends))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
