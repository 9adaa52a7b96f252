"""A run as one HTML file: figures, curves, pictures and the commands to go on with, everything embedded.

Opening it fetches nothing and runs no script, so that the file can be mailed or kept beside a checkpoint.
"""

import base64
import html
import io
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667085; --line: #e3e6eb; --paper: #ffffff; --card: #f7f8fa;
        --accent: #2458d3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --soft: #98a1b0; --line: #2d333d; --paper: #14171c; --card: #1c2027; --accent: #86a8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .9rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
.note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .42rem 1.4rem .42rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.value { font-weight: 600; white-space: nowrap; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.2rem; }
figure { margin: 0 0 1.6rem; }
.curves figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem; }
svg { width: 100%; height: auto; display: block; color: var(--ink); }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .3rem; background: #fff; }
pre { margin: .2rem 0 1rem; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
      border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere;
      font: .86rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; } figure, pre { break-inside: avoid; } }
"""


def escape(value: Any) -> str:
    """The value as text that is safe in HTML."""
    return html.escape(str(value), quote=True)


def shown(value: Any) -> str:
    """The value as text: four significant digits of a float, separators of thousands in an int, '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}" if abs(int(value)) >= 10000 else str(int(value))
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    return escape(value)


def curve(name: str, xs: Sequence[float], ys: Sequence[float], axis: str = "images") -> str:
    """An inline SVG of values over `axis`, in the page's text colour, so that it is legible on light and dark pages."""
    import matplotlib.figure

    xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    if xs.ndim != 1 or xs.shape != ys.shape:
        raise ValueError(f"curve {name!r}: {xs.shape} {axis} and {ys.shape} values, expected two vectors of one length")
    figure = matplotlib.figure.Figure(figsize=(4.4, 2.5))
    axes = figure.add_subplot()
    kept = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[kept], ys[kept]
    axes.plot(xs, ys, color="#4a7bea", linewidth=1.0 if len(xs) > 60 else 1.7, alpha=0.35 if len(xs) > 60 else 1.0)
    if len(xs) > 60:
        # A noisy curve is read by its running mean; the raw values stay visible behind it.
        window = max(5, len(ys) // 25)
        smooth = np.convolve(ys, np.ones(window) / window, mode="valid")
        axes.plot(xs[window // 2 : window // 2 + len(smooth)], smooth, color="#4a7bea", linewidth=1.8)
    if len(xs) == 1:
        axes.plot(xs, ys, "o", color="#4a7bea")
    if len(ys) and ys.min() > 0 and ys.max() > 30 * ys.min():
        axes.set_yscale("log")
    ink = "#010203"  # replaced by currentColor below
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set(color=ink, alpha=0.4, linewidth=0.7)
    axes.grid(True, color=ink, alpha=0.12, linewidth=0.6)
    axes.tick_params(which="both", colors=ink, labelsize=8, length=0)
    axes.set_xlabel(axis, fontsize=8, color=ink)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    if len(ys):
        last = f"last {ys[-1]:.4g}"
        axes.set_title(last, fontsize=8, color=ink, loc="right", alpha=0.7, pad=3)
    figure.tight_layout(pad=0.4)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
    # Glyphs and clip paths have ids, which must differ between the pictures of a page.
    prefix = re.sub(r"\W+", "_", name)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\1{prefix}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)


def picture(path: str | pathlib.Path) -> str:
    """An <img> that holds the PNG, JPEG or WebP file. FileNotFoundError, or ValueError for another kind of file."""
    path = pathlib.Path(path)
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{path}: expected a PNG, JPEG or WebP picture")
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/{kinds[path.suffix.lower()]};base64,{data}">'


def figures(table: Sequence[Any]) -> str:
    """An HTML table of rows (name, value, note), or of dicts whose keys are the columns."""
    if not table:
        return ""
    if not isinstance(table[0], Mapping):
        rows = [
            f'<tr><td>{escape(name)}</td><td class="value">{shown(value)}</td><td class="note">{escape(note)}</td></tr>'
            for name, value, note in table
        ]
        return f'<div class="scroll"><table>{"".join(rows)}</table></div>'
    columns = list(dict.fromkeys(key for row in table for key in row))
    numbers = {
        key for key in columns if all(isinstance(row.get(key), int | float | np.number | None) for row in table)
    }  # fmt: skip
    kind = {key: ' class="number"' if key in numbers else "" for key in columns}
    head = "".join(f"<th{kind[key]}>{escape(key)}</th>" for key in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{kind[key]}>{shown(row.get(key))}</td>" for key in columns) + "</tr>" for row in table
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_report(
    path: str | pathlib.Path,
    title: str,
    curves: Iterable[tuple[str, Sequence[float], Sequence[float]]] = (),
    grids: Iterable[tuple[str, str | pathlib.Path, str]] = (),
    table: Sequence[Any] = (),
    commands: Iterable[tuple[str, str]] = (),
    environment: Mapping[str, Any] | None = None,
    summary: str = "",
) -> pathlib.Path:
    """Write the page to `path`, whole or not at all.

    curves: (name, images seen, values), for durations count images here; points that are not finite are left out. grids: (title,
    picture file, note). table: rows (name, value, note), or dicts with the columns' names as keys. commands: (what it does,
    command line). `summary` is a paragraph below the title. All text is escaped. Raises FileNotFoundError for a missing picture.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    if summary:
        parts.append(f'<p class="note">{escape(summary)}</p>')
    if table:
        parts.append(f"<h2>Figures</h2>{figures(list(table))}")
    if pictures := list(grids):
        parts.append("<h2>Pictures</h2>")
        for name, file, note in pictures:
            caption = f'<p class="note">{escape(note)}</p>' if note else ""
            parts.append(f"<figure><h3>{escape(name)}</h3>{caption}{picture(file)}</figure>")
    if lines := list(curves):
        drawn = "".join(f"<figure><h3>{escape(name)}</h3>{curve(name, xs, ys)}</figure>" for name, xs, ys in lines)
        parts.append(f'<h2>Curves</h2><div class="curves">{drawn}</div>')
    if steps := list(commands):
        parts.append("<h2>Go on with</h2>")
        parts += [f"<h3>{escape(what)}</h3><pre>{escape(command)}</pre>" for what, command in steps]
    if environment:
        entries = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in environment.items())
        parts.append(f"<h2>Made with</h2><dl>{entries}</dl>")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>" + "\n".join(parts) + "</body></html>\n"
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
