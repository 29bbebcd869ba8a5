"""The table of results as markdown, and as one self-contained HTML page with table, plots and pictures."""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dsdiff.metrics.scores import Score, cell
from dsdiff.results.record import Results, RowResult

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e")  # can be told apart by the colour blind
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")  # of the ways to draw
# Scores that are plotted against time, and their titles.
TIMED = {
    "fid": "FID, lower is better",
    "psnr": "PSNR to FP32 in dB, higher is better",
    "attributes": "attributes right in %, higher is better",
}
THEIRS = "FID the original published (SD v1.4, Inception)"
SHOWN_SIDE = 256  # pixels of a picture on the page, at most
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td.theirs, th.theirs { color: #666; font-style: italic; }
.wide { overflow-x: auto; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots svg { width: calc(50% - .5rem); min-width: 20rem; height: auto; }
.pictures td { padding: 2px; border: 0; text-align: center; font-size: 13px; max-width: 10rem; }
.pictures td:first-child { text-align: right; vertical-align: middle; padding-right: .7rem; }
.pictures img { width: 9rem; display: block; }
.notes { color: #444; font-size: 14px; }
"""


# --- cells -------------------------------------------------------------------------------------------------


def score_cell(row: RowResult, key: str) -> str:
    """Return a score with its interval or spread; - where the row has none."""
    return cell(row.scores[key]) if key in row.scores else "-"


def change_cell(row: RowResult) -> str:
    """Return by how many percent the row's FID is above the baseline's; - for the baseline."""
    change = row.change
    if change is None:
        return "-"
    interval = "" if change.low is None or change.high is None else f" [{change.low:+.1f}, {change.high:+.1f}]"
    return f"{change.value:+.1f}%{interval}"


def speed_cell(row: RowResult) -> str:
    speed = row.unet.speed
    return f"{speed.median:.2f} ({speed.min:.2f}..{speed.max:.2f})"


def picture_cell(row: RowResult) -> str:
    """Return the seconds of a picture, and how many times as fast it is as the baseline's; - without them."""
    if row.picture is None:
        return "-"
    speed = row.picture.speed
    return f"{row.picture.seconds:.3g}; {speed.median:.2f} ({speed.min:.2f}..{speed.max:.2f})"


def cells(row: RowResult) -> list[str]:
    """Return a row of the table, without the original's figure."""
    return [
        row.row.title,
        score_cell(row, "fid"),
        change_cell(row),
        score_cell(row, "fid_to_base"),
        score_cell(row, "psnr"),
        score_cell(row, "ssim"),
        score_cell(row, "shapes_clip_score" if "shapes_clip_score" in row.scores else "clip_score"),
        score_cell(row, "attributes"),
        f"{row.unet.weight_bytes / 1e6:.2f}",
        speed_cell(row),
        picture_cell(row),
    ]


def head(base: RowResult) -> list[str]:
    """Return the titles of the columns of `cells`. results.json has more scores: KID, precision, recall, LPIPS."""
    return [
        "",
        f"FID ({base.features})" if base.features else "FID",
        "FID against FP32",
        "FID to FP32's pictures",
        "PSNR to FP32, dB",
        "SSIM to FP32",
        "CLIP score (shapes)" if "shapes_clip_score" in base.scores else "CLIP score",
        "attributes right, %",
        "UNet, MB",
        "speed of a UNet call, FP32 = 1",
        "seconds a picture; speed, FP32 = 1",
    ]


def theirs(row: RowResult) -> str:
    """Return the FID that the original work published for this row; - if none."""
    return "-" if row.row.published is None else f"{row.row.published:.2f}"


# --- the text ----------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """Return the table, how it came about, and the notes."""
    base = results.rows[0]
    lines = [[*head(base), THEIRS], ["---"] * (len(head(base)) + 1)]
    lines += [[*cells(row), theirs(row)] for row in results.rows]
    table = "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
    remarks = "\n".join(f"- {note}" for note in notes(results.rows))
    return f"{table}\n\n{protocol(results)}\n\n{remarks}"


def protocol(results: Results) -> str:
    """Return what was drawn, scored and timed, and on what, in words."""
    base, on = results.rows[0], results.machine
    reference = base.protocol.reference
    against = "" if reference is None else f" against {reference['n']} of {reference['source']}"
    drawn = ", ".join(f"{name} {value}" for name, value in results.drawn.items())
    return (
        f"{base.n} pictures a row ({drawn}, seed {results.seed}){against}; intervals of 95%; speed side by side with "
        f"FP32, median (least..most) of {results.repeats}, on {on.get('gpu', on['cpu'])}, {on['cores']} cores, torch "
        f"{on['torch']}. {engines(results.rows)}"
    )


def engines(rows: Sequence[RowResult]) -> str:
    """Return what computed the rows, in words."""
    by_engine: dict[str, list[str]] = {}
    for row in rows:
        names = by_engine.setdefault(f"{row.engine}, precision {row.precision}", [])
        names += [row.row.name] if row.row.name not in names else []
    return "Computed by " + "; ".join(f"{engine}: {' and '.join(names)}" for engine, names in by_engine.items()) + "."


def notes(rows: Sequence[RowResult]) -> list[str]:
    """Return the notes on the scores. One that all rows have, or all but one, comes once; others with the row's name.

    The baseline lacks the notes on pairs.
    """
    places: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            places.setdefault(note, []).append(row.row.title)
    enough = max(len(rows) - 1, 2)
    common = [note for note, titles in places.items() if len(titles) >= enough]
    return common + [f"{', '.join(titles)}: {note}" for note, titles in places.items() if len(titles) < enough]


# --- the page ----------------------------------------------------------------------------------------------


def page(results: Results, folder: Path) -> str:
    """Return a page of HTML with everything in it. folder: of the results, in which the rows' pictures lie."""
    rows, base = results.rows, results.rows[0]
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in head(base)) + f'<th class="theirs">{THEIRS}</th>'
    body = "\n".join(_table_row([*cells(row), theirs(row)]) for row in rows)
    remarks = "".join(f"<li>{html.escape(note)}</li>" for note in notes(rows))
    plots = plot(rows, "fid", "FID, lower is better") + plot(rows, "psnr", "PSNR to FP32 in dB, higher is better")
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>DSDiff: results ({html.escape(results.model)})</title>
<style>{STYLE}</style></head>
<body>
<h1>Few bits, fewer tokens: results ({html.escape(results.model)})</h1>
<p>{html.escape(protocol(results))}</p>
<div class="wide"><table id="results"><thead><tr>{titles}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<h2>Against the ratio of merged tokens</h2>
<div class="plots">{plots}</div>
<h2>Against the seconds of a picture</h2>
<div class="plots">{against_time(rows)}</div>
<h2>The same prompts from the same noise</h2>
<div class="wide">{pictures(results, folder)}</div>
<h2>Notes</h2>
<ul class="notes">{remarks}</ul>
</body>
</html>"""


def _table_row(texts: Sequence[str]) -> str:
    *ours, published = (html.escape(text) for text in texts)
    return "<tr>" + "".join(f"<td>{text}</td>" for text in ours) + f'<td class="theirs">{published}</td></tr>'


def plot(rows: Sequence[RowResult], key: str, title: str) -> str:
    """Return a score against the ratio as SVG, a line for each bit width. What is infinite is left out."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, name in zip(COLOURS * 9, dict.fromkeys(row.row.name for row in rows), strict=False):
        lines = [row for row in rows if row.row.name == name and key in row.scores and not row.row.drawn_words]
        found = [(row.row.ratio, row.scores[key]) for row in lines]
        found = [(ratio, score) for ratio, score in found if math.isfinite(score.value)]
        if found:
            ratios, values = [ratio for ratio, _ in found], [score.value for _, score in found]
            bars = [[_reach(score, score.low) for _, score in found], [_reach(score, score.high) for _, score in found]]
            axes.errorbar(ratios, values, bars, label=name, color=colour, marker="o", capsize=3)
    axes.set(xlabel="ratio of merged tokens", title=title)
    return _svg(figure, axes, key)


def against_time(rows: Sequence[RowResult]) -> str:
    """Return plots of the scores against the seconds of a picture, for those that rows have."""
    plots = [plot_time(rows, key, title) for key, title in TIMED.items() if any(key in row.scores for row in rows)]
    return "".join(plots)


def plot_time(rows: Sequence[RowResult], key: str, title: str) -> str:
    """Return a score against the seconds of a picture as SVG.

    Each bit width has a colour, and each way to draw a mark, which is larger for a larger ratio. Values that are
    infinite or were not timed are left out.
    """
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(dict.fromkeys(row.row.name for row in rows), COLOURS * 9, strict=False))
    marks = dict(zip(dict.fromkeys(row.row.drawn_words for row in rows), MARKS * 9, strict=False))
    for row in rows:
        score = row.scores.get(key)
        if score is None or row.picture is None or not math.isfinite(score.value):
            continue
        name, words = row.row.name, row.row.drawn_words
        bars = [[_reach(score, score.low)], [_reach(score, score.high)]]
        style = {"color": colours[name], "marker": marks[words], "markersize": 5 + 6 * row.row.ratio}
        axes.errorbar(row.picture.seconds, score.value, bars, linestyle="", capsize=2, **style)
    for name, colour in colours.items():
        axes.plot([], [], color=colour, marker="o", linestyle="", label=name)
    for words, mark in marks.items():
        axes.plot([], [], color="#555555", marker=mark, linestyle="", label=words or "as the baseline")
    axes.set(xlabel="seconds a picture (larger marks: more merged)", title=title, xscale="log")
    return _svg(figure, axes, f"time {key}")


def _svg(figure: Figure, axes: Axes, salt: str) -> str:
    """Return a figure as SVG, the same bytes each time."""
    if axes.has_data():
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _reach(score: Score, end: float | None) -> float:
    """Return how far an interval reaches to one end; 0 where it has none, or where that is infinite."""
    return abs(score.value - end) if end is not None and math.isfinite(end) else 0.0


def pictures(results: Results, folder: Path) -> str:
    """Return a table with a line for each row of the results and a column for each shown prompt."""
    shown = results.shown
    prompts = "".join(f"<td>{html.escape(results.prompts[i])}</td>" for i in shown)
    lines = [
        f"<tr><td>{html.escape(row.row.title)}</td>"
        + "".join(f"<td>{_image(folder / row.pictures / f'{i:05}.png', row.row.title)}</td>" for i in shown)
        + "</tr>"
        for row in results.rows
    ]
    return f'<table class="pictures"><tr><td></td>{prompts}</tr>{"".join(lines)}</table>'


def _image(path: Path, title: str) -> str:
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        picture.save(buffer, format="PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{content}">'
