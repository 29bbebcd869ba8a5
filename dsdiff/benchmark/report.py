"""What a benchmark tells: tables on the terminal and as markdown, and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e")  # told apart with defects of colour vision, too
WIDE_RANGE = 20  # slowest over fastest, from which on the plot's axis is logarithmic

Report = Mapping[str, Any]
Table = list[list[str]]  # the first line is the head


# --- text --------------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """For the terminal."""
    parts = [*facts(report), "", *_aligned(times(report))]
    if any(row["shares"] for row in report["settings"]):
        parts += ["", *_aligned(shares(report))]
    return "\n".join([*parts, "", *remarks(report)])


def markdown(report: Report) -> str:
    tables = [times(report)] + ([shares(report)] if any(row["shares"] for row in report["settings"]) else [])
    parts = [*(_piped(table) for table in tables), " ".join(facts(report)), "\n".join(remarks(report, bullet="- "))]
    return "\n\n".join(parts) + "\n"


def _aligned(table: Table) -> list[str]:
    """The first column to the left, the others to the right; a blank line where the first has a new entry."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines, last = [], table[1][0]
    for cells in table:
        if lines and cells[0] != last:
            lines, last = [*lines, ""], cells[0]
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return lines


def _piped(table: Table) -> str:
    head, *body = table
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


# --- tables ------------------------------------------------------------------------------------------------


def times(report: Report) -> Table:
    """A line a setting: seconds and what they are compared with, sizes."""
    head = [
        "engine",
        "ratio",
        "tokens",
        "s per UNet call",
        f"UNet s/picture ({report['steps']} steps)",
        "x float32",
        "x bf16",
        "x unmerged",
        "weights MB",
        "peak MB",
    ]
    return [head, *(_times_line(row, report) for row in report["settings"])]


def _times_line(row: Mapping[str, Any], report: Report) -> list[str]:
    engine = report["engines"][row["engine"]]
    return [
        row["engine"],
        f"{row['ratio']:g}",
        f"{row['tokens']:.0%}",
        _spread(row["seconds"], 4),
        f"{report['steps'] * row['seconds']['median']:.4g}",
        *(_spread(row[name], 3) for name in ("speedup", "speedup_bf16", "merging")),
        f"{engine['weight_bytes'] / 1e6:.1f}",
        "-" if engine["peak_bytes"] is None else f"{engine['peak_bytes'] / 1e6:.0f}",
    ]


def shares(report: Report) -> Table:
    """A line a setting: where its time goes."""
    rows = [row for row in report["settings"] if row["shares"]]
    head = ["share of time", "ratio", *rows[0]["shares"]]
    return [
        head,
        *([row["engine"], f"{row['ratio']:g}", *(f"{part:.0%}" for part in row["shares"].values())] for row in rows),
    ]


def _spread(of: Mapping[str, float] | None, digits: int) -> str:
    if of is None:
        return "-"
    median, low, high = (f"{of[name]:.{digits}g}" for name in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}..{high})"


# --- lines -------------------------------------------------------------------------------------------------


def facts(report: Report) -> list[str]:
    """On the model, and on the machine."""
    model, on = report["model"], report["machine"]
    weights = "random weights" if model["random_weights"] else "trained weights"
    return [
        f"{model['config']}: UNet of {model['parameters'] / 1e6:.1f} M parameters, {weights}, latents "
        f"{model['latents']}, context {model['context']}; quantized to {model['bits']}, {model['ranges']}.",
        f"{on.get('gpu', on['cpu'])}, {on['cores']} cores, {on['threads']} threads, torch {on['torch']}; median "
        f"(least..most) of {report['repeats']} repeats, ratios within a repeat. A picture is its calls of the UNet, "
        "text encoder and decoder left out.",
    ]


def remarks(report: Report, bullet: str = "") -> list[str]:
    """On operations, the floor of int8, and what is missing."""
    lines = []
    for counted in report["operations"]:
        parts = [f"{count / 1e9:.3g} in {kind}" for kind, count in counted["operations"].items()]
        lines.append(f"Giga operations a call, ratio {counted['ratio']:g}: {', '.join(parts)}.")
    if report["floor"]:
        rates = [f"{kind} {rate / 1e9:.0f}" for kind, rate in report["floor"]["peaks"].items()]
        lines.append(f"Peak of the integer kernels, giga operations a second: {', '.join(rates)}.")
        least = [f"{of['seconds']:.3g} s at ratio {of['ratio']:g}" for of in report["floor"]["ratios"]]
        taken = [f"{of['times']:.3g}" for of in report["floor"]["ratios"]]
        lines.append(f"Operations over peak: {', '.join(least)} a call; int8 takes {', '.join(taken)} times that.")
    lines += [f"{name} is left out: {reason}." for name, reason in report["left_out"].items()]
    return [bullet + line for line in lines]


# --- plot --------------------------------------------------------------------------------------------------


def plot(report: Report, path: Path) -> None:
    """Seconds per call as a PNG: a bar a setting, whiskers from least to most, its speed-up beside it."""
    rows = report["settings"]
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    places = _places(rows)
    for colour, ratio in zip(COLOURS * len(ratios), ratios, strict=False):
        chosen = [(place, row) for place, row in zip(places, rows, strict=True) if row["ratio"] == ratio]
        _bars(axes, chosen, colour, f"ratio {ratio:g}")
    _label(axes, rows, places)
    model, on = report["model"], report["machine"]
    title = f"{model['config']}, latents {model['latents']}\n{on.get('gpu', on['cpu'])}, {on['threads']} threads"
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png", dpi=150)


def _bars(axes: Any, rows: Sequence[tuple[float, Mapping[str, Any]]], colour: str, label: str) -> None:
    seconds = [row["seconds"] for _, row in rows]
    medians = [of["median"] for of in seconds]
    whiskers = [[of["median"] - of["min"] for of in seconds], [of["max"] - of["median"] for of in seconds]]
    places = [place for place, _ in rows]
    axes.barh(places, medians, 0.8, xerr=whiskers, color=colour, label=label, capsize=2, ecolor="#555555")


def _label(axes: Any, rows: Sequence[Mapping[str, Any]], places: Sequence[float]) -> None:
    """Names of the engines, speed-ups beside the bars, and an axis that holds them."""
    longest, shortest = (f(row["seconds"]["max"] for row in rows) for f in (max, min))
    logarithmic = longest > WIDE_RANGE * shortest
    axes.set_xscale("log" if logarithmic else "linear")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(shortest / 3 if logarithmic else 0, longest * (3 if logarithmic else 1.2))
    for place, row in zip(places, rows, strict=True):
        speed = f"{row['speedup']['median']:.2g} x"
        axes.annotate(
            speed, (row["seconds"]["max"], place), (5, 0), textcoords="offset points", va="center", fontsize=9
        )
    names = list(dict.fromkeys(row["engine"] for row in rows))
    of_engine = [[place for place, row in zip(places, rows, strict=True) if row["engine"] == name] for name in names]
    axes.set_yticks([sum(group) / len(group) for group in of_engine], names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per UNet call; n x: n times as fast as float32 at ratio 0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)


def _places(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the bars, with a gap between engines."""
    places, last = [0.0], rows[0]["engine"]
    for row in rows[1:]:
        places.append(places[-1] + (1.0 if row["engine"] == last else 1.6))
        last = row["engine"]
    return places
