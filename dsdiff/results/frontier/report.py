"""The table and the plot of ways to draw."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsdiff.results.frontier.figures import Costs, Row, frontier
from ldm.fileio import write_atomically

BEST, OTHER = "#c0392b", "#7f8c8d"  # colours of the rows on the frontier, and of others
HEAD = ("error of eps", "PSNR, dB", "per picture, dB", "attributes right, %", "times the base")
LABELS = {
    "eps": "mean squared error of guided eps in one step",
    "pictures": "PSNR to the base's pictures, mean of pictures, dB",
    "attributes": "attributes right, %",
}


def write(comparisons: Sequence[Costs], outdir: Path, name: str) -> None:
    """Write NAME.json, NAME.md, and NAME.png where times and one of the other figures were measured.

    comparisons: of different numbers of steps, or a single one.
    """
    content = {"comparisons": [costs.to_dict() for costs in comparisons]}
    texts = {"json": json.dumps(content, indent=2, allow_nan=False), "md": markdown(comparisons)}
    for suffix, text in texts.items():
        path = outdir / f"{name}.{suffix}"
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text + "\n", encoding="utf-8"))
    if panels(comparisons):
        write_atomically(outdir / f"{name}.png", lambda temporary: plot(comparisons, temporary))


def markdown(comparisons: Sequence[Costs]) -> str:
    """Return a table for each comparison, and a line that says what was measured. Names on the frontier are bold."""
    several = len(comparisons) > 1
    lines = []
    for costs in comparisons:
        best = frontier(costs.rows)
        lines += [
            f"| {f'{costs.steps} steps' if several else ''} | {' | '.join(HEAD)} |",
            "|---" * (1 + len(HEAD)) + "|",
            *(f"| {_bold(row.name, row.name in best)} | {' | '.join(cells(row))} |" for row in costs.rows),
            "",
        ]
    costs = comparisons[0]
    timed = any(row.time is not None for row in costs.rows)
    told = f"{costs.n} prompts, {costs.model}."
    told += f" Quality: {_where(costs.quality_of)}." if costs.quality_of is not None else ""
    told += f" Time: {costs.time_of}; {_where(costs.machine)}." if timed else ""
    return "\n".join([*lines, told]).replace("|  |", "| |")


def cells(row: Row) -> list[str]:
    """Return the figures of a row as texts; "-" for what was not measured."""
    eps = "-" if row.eps is None else f"{row.eps.mse:.2e} ± {row.eps.error:.0e}"
    pooled = each = "-"
    if row.pictures is not None:
        pooled = "equal" if row.pictures.psnr is None else f"{row.pictures.psnr:.1f}"
        each = "-" if row.pictures.mean is None else f"{row.pictures.mean:.1f} ± {row.pictures.error:.1f}"
    right = row.attributes
    told = "-" if right is None else f"{right.percent:.1f} [{right.low:.1f}, {right.high:.1f}]"
    if row.time is None:
        return [eps, pooled, each, told, "-"]
    speed = row.time.speed
    return [eps, pooled, each, told, f"{speed.median:.3f} ({speed.min:.3f}..{speed.max:.3f})"]


def panels(comparisons: Sequence[Costs]) -> list[str]:
    """Return the names of the figures that can be plotted against time."""
    timed = [row for costs in comparisons for row in costs.rows if row.time is not None]
    return [name for name in LABELS if any(_height(row, name) is not None for row in timed)]


def plot(comparisons: Sequence[Costs], path: Path) -> None:
    """Plot figures against speed to a PNG, a panel each, a row for each comparison; lines join the frontier."""
    names, first = panels(comparisons), comparisons[0]
    figure = Figure(figsize=(7.5 * len(names), 5.5 * len(comparisons)), layout="constrained")
    parts = figure.subplots(len(comparisons), len(names), squeeze=False)
    for line, costs in zip(parts, comparisons, strict=True):
        rows = [row for row in costs.rows if row.time is not None]
        for axes, name in zip(line, names, strict=True):
            _panel(axes, rows, name, frontier(rows))
        if len(comparisons) > 1:
            line[0].set_title(f"{costs.steps} steps", loc="left")
    figure.suptitle(f"{first.model}; time of {first.time_of}\n{_where(first.machine)}", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, format="png", dpi=120 if len(comparisons) == 1 else 80)


def _panel(axes: Axes, rows: Sequence[Row], name: str, best: Sequence[str]) -> None:
    """Draw a dot with its standard error and its name for each row that has the figure."""
    line = []
    for row in rows:
        height = _height(row, name)
        if height is None or row.time is None:
            continue
        at = (row.time.speed.median, height[0])
        axes.errorbar(*at, [[end] for end in height[1]], fmt="o", color=BEST if row.name in best else OTHER, capsize=2)
        axes.annotate(row.name, at, (5, 4), textcoords="offset points", fontsize=7)
        line += [at] if row.name in best else []
    axes.plot([x for x, _ in sorted(line)], [y for _, y in sorted(line)], color=BEST, linewidth=1, alpha=0.5)
    axes.axvline(1, color="#cccccc", linewidth=1)
    axes.set_xlabel("times as fast as the base")
    axes.set_ylabel(LABELS[name])
    if name == "eps":
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _height(row: Row, name: str) -> tuple[float, tuple[float, float]] | None:
    """Return the figure of a panel, and how far its error reaches down and up; None if the row has none."""
    if name == "eps":
        return None if row.eps is None or not row.eps.mse else (row.eps.mse, (row.eps.error, row.eps.error))
    if name == "attributes":
        right = row.attributes
        return None if right is None else (right.percent, (right.percent - right.low, right.high - right.percent))
    if row.pictures is None or row.pictures.mean is None or row.pictures.error is None:
        return None
    return row.pictures.mean, (row.pictures.error, row.pictures.error)


def _bold(text: str, on: bool) -> str:
    return f"**{text}**" if on else text


def _where(machine: Mapping[str, Any]) -> str:
    return f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads"
