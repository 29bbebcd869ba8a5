"""The table and the plot of ways to merge tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsdiff.results.merging.figures import MergingCosts, Row, frontier
from ldm.fileio import write_atomically

BEST, OTHER = "#c0392b", "#7f8c8d"  # colours of the rows on the frontier, and of others


def write(costs: MergingCosts, outdir: Path) -> None:
    """Write merging.json, merging.md, and merging.png where times and one of the other figures were measured."""
    texts = {"json": json.dumps(costs.to_dict(), indent=2, allow_nan=False), "md": markdown(costs)}
    for suffix, text in texts.items():
        path = outdir / f"merging.{suffix}"
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text + "\n", encoding="utf-8"))
    if panels(costs):
        write_atomically(outdir / "merging.png", lambda temporary: plot(costs, temporary))


def markdown(costs: MergingCosts) -> str:
    """Return the table, with a line that says what was measured. Names on the frontier are bold."""
    best = frontier(costs.rows)
    lines = [
        "| | error of eps | PSNR, dB | per picture, dB | times unmerged |",
        "|---|---|---|---|---|",
        *(f"| {_bold(row.name, row.name in best)} | {' | '.join(cells(row))} |" for row in costs.rows),
        "",
        f"{costs.n} prompts, {costs.model}.",
    ]
    timed = any(row.time is not None for row in costs.rows)
    return "\n".join(lines) + (f" Time: {costs.time_of}; {_where(costs)}." if timed else "")


def cells(row: Row) -> list[str]:
    """Return the figures of a row as texts; "-" for what was not measured."""
    eps = "-" if row.eps is None else f"{row.eps.mse:.2e} ± {row.eps.error:.0e}"
    pooled = each = "-"
    if row.pictures is not None:
        pooled = "equal" if row.pictures.psnr is None else f"{row.pictures.psnr:.1f}"
        each = "-" if row.pictures.mean is None else f"{row.pictures.mean:.1f} ± {row.pictures.error:.1f}"
    if row.time is None:
        return [eps, pooled, each, "-"]
    speed = row.time.speed
    return [eps, pooled, each, f"{speed.median:.3f} ({speed.min:.3f}..{speed.max:.3f})"]


def panels(costs: MergingCosts) -> list[str]:
    """Return the names of the figures that can be plotted against time."""
    timed = [row for row in costs.rows if row.time is not None]
    return [name for name in ("eps", "pictures") if any(_height(row, name) is not None for row in timed)]


def plot(costs: MergingCosts, path: Path) -> None:
    """Plot error of eps and PSNR against speed to a PNG, a panel each; lines join the rows on the frontier."""
    rows, names = [row for row in costs.rows if row.time is not None], panels(costs)
    figure = Figure(figsize=(7.5 * len(names), 5.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _panel(axes, rows, name, frontier(rows))
    figure.suptitle(f"{costs.model}; time of {costs.time_of}\n{_where(costs)}", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, format="png", dpi=120)


def _panel(axes: Axes, rows: Sequence[Row], name: str, best: Sequence[str]) -> None:
    """Draw a dot with its standard error and its name for each row that has the figure."""
    line = []
    for row in rows:
        height = _height(row, name)
        if height is None or row.time is None:
            continue
        at = (row.time.speed.median, height[0])
        axes.errorbar(*at, height[1], fmt="o", color=BEST if row.name in best else OTHER, capsize=2)
        axes.annotate(row.name, at, (5, 4), textcoords="offset points", fontsize=7)
        line += [at] if row.name in best else []
    axes.plot([x for x, _ in sorted(line)], [y for _, y in sorted(line)], color=BEST, linewidth=1, alpha=0.5)
    axes.axvline(1, color="#cccccc", linewidth=1)
    axes.set_xlabel("times as fast as without merging")
    if name == "eps":
        axes.set_yscale("log")
        axes.set_ylabel("mean squared error of guided eps in one step")
    else:
        axes.set_ylabel("PSNR to pictures without merging, mean of pictures, dB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _height(row: Row, name: str) -> tuple[float, float] | None:
    """Return the figure of a panel and its standard error; None if the row has none."""
    if name == "eps":
        return None if row.eps is None else (row.eps.mse, row.eps.error)
    if row.pictures is None or row.pictures.mean is None or row.pictures.error is None:
        return None
    return row.pictures.mean, row.pictures.error


def _bold(text: str, on: bool) -> str:
    return f"**{text}**" if on else text


def _where(costs: MergingCosts) -> str:
    return f"{costs.machine.get('gpu', costs.machine['cpu'])}, {costs.machine['threads']} threads"
