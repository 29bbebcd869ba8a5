"""Write the report of a benchmark: tables for the terminal and in markdown, JSON, and a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsdiff.benchmark.figures import Report, SettingFigures, Spread
from ldm.fileio import write_atomically

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e")  # distinct for colour-blind readers, too
OPTIONAL = {"x fp16": "speedup_fp16", "x fp16-compile": "speedup_compiled", "x openvino-int8": "speedup_openvino"}
WIDE_RANGE = 20  # slowest over fastest, from which on the plot's axis is logarithmic

Table = list[list[str]]  # the first line is the head


def write(report: Report, outdir: Path) -> None:
    """Write benchmark.json, benchmark.md and benchmark.png into outdir."""
    outdir.mkdir(parents=True, exist_ok=True)
    write_text(outdir / "benchmark.json", json.dumps(asdict(report), indent=2) + "\n")
    write_text(outdir / "benchmark.md", markdown(report))
    write_atomically(outdir / "benchmark.png", lambda path: plot(report, path))


def write_text(path: Path, content: str) -> None:
    """Write a text file, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


# --- text --------------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """Return the tables and remarks for the terminal."""
    parts = [*facts(report), "", *aligned(times(report))]
    if any(row.shares for row in report.settings):
        parts += ["", *aligned(shares(report))]
    return "\n".join([*parts, "", *remarks(report)])


def markdown(report: Report) -> str:
    """Return the tables and remarks as markdown."""
    tables = [times(report)] + ([shares(report)] if any(row.shares for row in report.settings) else [])
    parts = [*(piped(table) for table in tables), " ".join(facts(report)), "\n".join(remarks(report, bullet="- "))]
    return "\n\n".join(parts) + "\n"


def aligned(table: Table) -> list[str]:
    """Return the lines of a table for the terminal.

    The first column is aligned to the left, the others to the right. A blank line stands wherever the first column
    changes.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines, last = [], table[1][0]
    for cells in table:
        if lines and cells[0] != last:
            lines, last = [*lines, ""], cells[0]
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return lines


def piped(table: Table) -> str:
    """Return a table as markdown."""
    head, *body = table
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


# --- tables ------------------------------------------------------------------------------------------------


def times(report: Report) -> Table:
    """Return a line for each setting: seconds, their ratios to others, sizes."""
    head = [
        "engine",
        "ratio",
        "tokens",
        "s per UNet call",
        *([f"UNet s/picture ({report.steps} steps)"] if _is_of_a_picture(report) else []),
        "x float32",
        "x bf16",
        *_beside(report),
        "x unmerged",
        "weights MB",
        "peak MB",
    ]
    return [head, *(_times_line(row, report) for row in report.settings)]


def _is_of_a_picture(report: Report) -> bool:
    """Tell whether a call is that of one picture, with guidance or without."""
    return report.model.latents[0] <= 2


def _beside(report: Report) -> dict[str, str]:
    """Return those of OPTIONAL that were measured: column -> field."""
    return {column: name for column, name in OPTIONAL.items() if any(getattr(row, name) for row in report.settings)}


def _times_line(row: SettingFigures, report: Report) -> list[str]:
    engine = report.engines[row.engine]
    others = [getattr(row, name) for name in _beside(report).values()]
    return [
        row.engine,
        f"{row.ratio:g}",
        f"{row.tokens:.0%}",
        spread(row.seconds, 4),
        *([f"{report.steps * row.seconds.median:.4g}"] if _is_of_a_picture(report) else []),
        *(spread(ratio, 3) for ratio in (row.speedup, row.speedup_bf16, *others, row.merging)),
        f"{engine.weight_bytes / 1e6:.1f}",
        "-" if engine.peak_bytes is None else f"{engine.peak_bytes / 1e6:.0f}",
    ]


def shares(report: Report) -> Table:
    """Return a line for each setting whose time was split by kind of operator."""
    rows = [(row, row.shares) for row in report.settings if row.shares]
    head = ["share of time", "ratio", *rows[0][1]]
    return [head, *([row.engine, f"{row.ratio:g}", *(f"{part:.0%}" for part in kinds.values())] for row, kinds in rows)]


def spread(values: Spread | None, digits: int) -> str:
    """Return a median with the least and the most, of so many digits; "-" for None."""
    if values is None:
        return "-"
    median, low, high = (f"{value:.{digits}g}" for value in (values.median, values.min, values.max))
    return median if low == high else f"{median} ({low}..{high})"


# --- lines -------------------------------------------------------------------------------------------------


def facts(report: Report) -> list[str]:
    """Return two sentences: on the model, and on the machine and the way of measuring."""
    model, machine = report.model, report.machine
    weights = "random weights" if model.random_weights else "trained weights"
    return [
        f"{model.config}: UNet of {model.parameters / 1e6:.1f} M parameters, {weights}, latents "
        f"{model.latents}, context {model.context}; quantized to {model.bits}, {model.ranges}.",
        f"{machine.get('gpu', machine['cpu'])} ({machine['isa']}), {machine['cores']} cores, {machine['threads']} "
        f"threads, torch {machine['torch']}; median (least..most) of {report.repeats} repeats, ratios within a repeat. "
        "A picture is its calls of the UNet, text encoder and decoder left out.",
    ]


def remarks(report: Report, bullet: str = "") -> list[str]:
    """Return sentences on the operations, on the floor of int8, and on what was left out."""
    lines = []
    for counted in report.operations:
        parts = [f"{count / 1e9:.3g} in {kind}" for kind, count in counted.operations.items()]
        lines.append(f"Giga operations a call, ratio {counted.ratio:g}: {', '.join(parts)}.")
    if report.floor:
        rates = [f"{kind} {rate / 1e9:.0f}" for kind, rate in report.floor.peaks.items()]
        lines.append(f"Peak of the integer kernels, giga operations a second: {', '.join(rates)}.")
        least = [f"{floor.seconds:.3g} s at ratio {floor.ratio:g}" for floor in report.floor.ratios]
        taken = [f"{floor.times:.3g}" for floor in report.floor.ratios]
        lines.append(f"Operations over peak: {', '.join(least)} a call; int8 takes {', '.join(taken)} times that.")
    lines += [f"{name} is left out: {reason}." for name, reason in report.left_out.items()]
    return [bullet + line for line in lines]


# --- plot --------------------------------------------------------------------------------------------------


def plot(report: Report, path: Path) -> None:
    """Plot the seconds of a call to a PNG: a bar for each setting, whiskers from least to most, its speed-up beside."""
    rows = report.settings
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ratios = list(dict.fromkeys(row.ratio for row in rows))
    places = _places(rows)
    for colour, ratio in zip(COLOURS * len(ratios), ratios, strict=False):
        chosen = [(place, row) for place, row in zip(places, rows, strict=True) if row.ratio == ratio]
        _bars(axes, chosen, colour, f"ratio {ratio:g}")
    _label(axes, rows, places)
    model, machine = report.model, report.machine
    where = f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads"
    title = f"{model.config}, latents {model.latents}\n{where}"
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png", dpi=150)


def _bars(axes: Axes, rows: Sequence[tuple[float, SettingFigures]], colour: str, label: str) -> None:
    """Draw the bars of a merge ratio. rows: each with its place on the axis."""
    seconds = [row.seconds for _, row in rows]
    medians = [values.median for values in seconds]
    whiskers = [[values.median - values.min for values in seconds], [values.max - values.median for values in seconds]]
    places = [place for place, _ in rows]
    axes.barh(places, medians, 0.8, xerr=whiskers, color=colour, label=label, capsize=2, ecolor="#555555")


def _label(axes: Axes, rows: Sequence[SettingFigures], places: Sequence[float]) -> None:
    """Write the names of the engines and the speed-ups beside the bars, and fit the axis to them."""
    longest, shortest = (f(row.seconds.max for row in rows) for f in (max, min))
    logarithmic = longest > WIDE_RANGE * shortest
    axes.set_xscale("log" if logarithmic else "linear")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(shortest / 3 if logarithmic else 0, longest * (3 if logarithmic else 1.2))
    for place, row in zip(places, rows, strict=True):
        speed = "" if row.speedup is None else f"{row.speedup.median:.2g} x"
        end = (row.seconds.max, place)
        axes.annotate(speed, end, (5, 0), textcoords="offset points", va="center", fontsize=9)
    names = list(dict.fromkeys(row.engine for row in rows))
    groups = [[place for place, row in zip(places, rows, strict=True) if row.engine == name] for name in names]
    axes.set_yticks([sum(group) / len(group) for group in groups], names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per UNet call; n x: n times as fast as float32 at ratio 0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)


def _places(rows: Sequence[SettingFigures]) -> list[float]:
    """Return where the bars stand on the axis, with a gap between engines."""
    places, last = [0.0], rows[0].engine
    for row in rows[1:]:
        places.append(places[-1] + (1.0 if row.engine == last else 1.6))
        last = row.engine
    return places
