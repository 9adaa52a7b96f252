"""The results of a study: results.md, results.csv and a PNG for each plot.

The Markdown table shows the keys that vary, the study's columns and the status; the CSV holds every override and every
number of every run. Both are rewritten whenever a run ends.
"""

import csv
import io
import math
import pathlib
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from ldm_jax.sweeps import records
from ldm_jax.sweeps.study import Plot, Range, Run, Study, plots

Row = dict[str, Any]  # {'run', 'overrides', 'metrics', 'status', 'seconds', 'error'}


def collect(runs: Sequence[Run]) -> list[Row]:
    """One row a run, in order, from the runs' folders."""
    table = []
    for run in runs:
        result = records.result(run)
        row = {"run": run.id, "overrides": run.overrides, "metrics": result.get("metrics", {})}
        row |= {"status": records.status(run), "seconds": result.get("seconds"), "error": result.get("error", "")}
        table.append(row)
    return table


def best(study: Study, table: Sequence[Row]) -> Row | None:
    """The finished run with the best finite objective, or None."""
    finished = [row for row in table if row["status"] == "done" and _number(row["metrics"].get(study.objective))]
    sign = 1 if study.direction == "minimize" else -1
    return min(finished, key=lambda row: sign * row["metrics"][study.objective], default=None)


def markdown(study: Study, table: Sequence[Row]) -> str:
    """The table as Markdown, the best run in bold, the failures and their errors below it."""
    keys = _keys(table)
    names = short_names(keys)
    varying = [key for key in keys if len({_text(row["overrides"].get(key)) for row in table}) > 1]
    columns = list(study.columns) or [name for name in [study.objective] if name]
    winner = best(study, table)
    count = {word: sum(row["status"] == word for row in table) for word in ("done", "failed", "pruned")}
    seconds = sum(row["seconds"] or 0.0 for row in table)
    lines = [f"# {study.title or study.name}", ""]
    tally = ", ".join(f"{n} {word}" for word, n in count.items() if n) or "none done yet"
    lines += [f"{len(table)} runs: {tally}; {seconds / 60:.1f} minutes of work in all.", ""]
    shared = [f"{key} = {_text(table[0]['overrides'].get(key))}" for key in keys if table and key not in varying]
    if shared:
        lines += [f"The same in all runs: {', '.join(shared)}.", ""]
    if winner:
        where = ", ".join(f"{names[key]} = {_text(winner['overrides'].get(key))}" for key in varying)
        aim = "lowest" if study.direction == "minimize" else "highest"
        lines += [f"The {aim} {study.objective}: {_text(winner['metrics'][study.objective])} at {where}.", ""]
    lines.append("| " + " | ".join([*(names[key] for key in varying), *columns, "status", "minutes"]) + " |")
    lines.append("|" + " --- |" * (len(varying) + len(columns) + 2))
    for row in table:
        cells = [_text(row["overrides"].get(key)) for key in varying]
        cells += [_text(row["metrics"].get(name)) for name in columns]
        cells += [row["status"], "" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"]
        if row is winner:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    failed = [row for row in table if row["status"] == "failed"]
    if failed:
        lines += ["", "Failed:", "", *(f"- `{row['run']}`: {row['error']}" for row in failed)]
    return "\n".join(lines) + "\n"


def comma_separated(table: Sequence[Row]) -> str:
    """Every run with all its overrides and all its numbers as CSV."""
    keys = _keys(table)
    metrics = sorted({name for row in table for name, value in row["metrics"].items() if _plain(value)} - set(keys))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *keys, *metrics, "status", "seconds", "error"])
    for row in table:
        values = [row["overrides"].get(key) for key in keys] + [row["metrics"].get(name) for name in metrics]
        writer.writerow([row["run"], *values, row["status"], row["seconds"], row["error"]])
    return text.getvalue()


def write_tables(study: Study, runs: Sequence[Run], workdir: pathlib.Path) -> list[pathlib.Path]:
    """Write results.md and results.csv in `workdir`."""
    table = collect(runs)
    records.write(workdir / "results.md", markdown(study, table))
    records.write(workdir / "results.csv", comma_separated(table))
    return [workdir / "results.md", workdir / "results.csv"]


def write(
    study: Study, runs: Sequence[Run], workdir: pathlib.Path, publish: pathlib.Path | None = None
) -> list[pathlib.Path]:
    """Write tables and plots in `workdir`, and copy them to `publish` if it is not None. Returns their paths."""
    table = collect(runs)
    paths = write_tables(study, runs, workdir)
    figures = {_file_name(plot): _draw(study, plot, table) for plot in plots(study)}
    if study.search is not None:
        figures["search"] = _draw_search(study, table)
    for name, figure in figures.items():
        if figure is not None:
            paths.append(workdir / f"{name}.png")
            figure.savefig(paths[-1], dpi=110)
    if publish is None:
        return paths
    publish.mkdir(parents=True, exist_ok=True)
    return [pathlib.Path(shutil.copy(path, publish / path.name)) for path in paths]


def _file_name(plot: Plot) -> str:
    words = [
        plot.y,
        "by",
        plot.x.rsplit(".", 1)[-1],
        *(["and", plot.hue.rsplit(".", 1)[-1]] if plot.kind == "heat" else []),
        *(f"{key.rsplit('.', 1)[-1]}={_text(chosen)}" for key, chosen in plot.where.items()),
    ]
    return "_".join(words).replace("/", "-")


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys by their last part, where that is unambiguous."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last)}


def _draw(study: Study, plot: Plot, table: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    rows = [row for row in table if row["status"] == "done"]
    rows = [row for row in rows if all(value(row, key) == chosen for key, chosen in plot.where.items())]
    points = [(row, value(row, plot.x), value(row, plot.y)) for row in rows]
    points = [(row, x, y) for row, x, y in points if x is not None and _number(y)]
    if not points:
        return None
    facets = _ordered(value(row, plot.facet) for row, _, _ in points) if plot.facet else [None]
    across = min(len(facets), 3)
    down = math.ceil(len(facets) / across)
    figure = Figure(figsize=(1.0 + 3.8 * across, 0.6 + 3.1 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=plot.kind == "line").ravel()
    draw = _heat if plot.kind == "heat" else _lines
    hues = _ordered(value(row, plot.hue) for row, _, _ in points) if plot.hue else [None]
    every = [y for _, _, y in points]
    for k, (facet, axis) in enumerate(zip(facets, axes)):
        draw(axis, study, plot, [p for p in points if facet is None or value(p[0], plot.facet) == facet], hues, every)
        if facet is not None:
            axis.set_title(f"{_label(plot.facet)} = {_text(facet)}", fontsize=10)
        if k % across:
            axis.set_ylabel("")
    for axis in axes[len(facets) :]:
        axis.set_axis_off()
    if hues != [None] and plot.kind == "line":
        axes[0].legend(fontsize=8)
    only = ", ".join(f"{_label(key)} = {_text(chosen)}" for key, chosen in plot.where.items())
    _title(figure, study, f": {_label(plot.y)}" if plot.kind == "heat" else "", only)
    return figure


def _title(figure: Any, study: Study, more: str = "", below: str = "") -> None:
    lines = [(study.title or study.name) + more, below]
    width = int(10.5 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in lines if line), fontsize=11)


def _lines(axis: Any, study: Study, plot: Plot, points: list, hues: list, every: list[float]) -> None:
    import matplotlib

    xs = _ordered(x for _, x, _ in points)
    numeric = all(_number(x) for x in xs)
    ordered = len(hues) > 1 and all(_number(hue) for hue in hues)
    colors = matplotlib.colormaps["viridis" if ordered else "tab10"]
    for k, hue in enumerate(hues):
        mine = [(x, y) for row, x, y in points if hue is None or value(row, plot.hue) == hue]
        at = {x: [y for other, y in mine if other == x] for x in xs if any(other == x for other, _ in mine)}
        if not at:
            continue
        place = list(at) if numeric else [xs.index(x) for x in at]
        color = colors(0.9 * k / (len(hues) - 1)) if ordered else colors(k % 10)
        label = None if hue is None else f"{_label(plot.hue)} = {_text(hue)}"
        # The line is dotted across names without a run: nothing was measured there.
        style = "o-" if numeric or len(at) == len(xs) else "o:"
        axis.plot(place, [sum(ys) / len(ys) for ys in at.values()], style, ms=4, color=color, label=label)
        if any(len(ys) > 1 for ys in at.values()):
            low, high = [min(ys) for ys in at.values()], [max(ys) for ys in at.values()]
            axis.fill_between(place, low, high, color=color, alpha=0.15, lw=0)
    if plot.log_x and numeric:
        axis.set_xscale("log")
    if plot.log_y:
        axis.set_yscale("log")
    if not numeric or len(xs) <= 8:
        # Ticks at the values of the runs, not at the round numbers between them.
        axis.set_xticks(xs if numeric else range(len(xs)), [_text(x) for x in xs])
        axis.minorticks_off() if not plot.log_y else axis.xaxis.minorticks_off()
    axis.set_xlabel(_label(plot.x))
    axis.set_ylabel(_label(plot.y))
    axis.grid(alpha=0.3)


def _heat(axis: Any, study: Study, plot: Plot, points: list, hues: list, every: list[float]) -> None:
    xs = _ordered(x for _, x, _ in points)
    cells = [[math.nan] * len(xs) for _ in hues]
    for i, hue in enumerate(hues):
        for j, x in enumerate(xs):
            ys = [y for row, other, y in points if other == x and value(row, plot.hue) == hue]
            if ys:
                cells[i][j] = sum(ys) / len(ys)
    sign = 1 if study.direction == "minimize" else -1
    low, high = min(every), max(every)
    colors = "viridis_r" if sign > 0 else "viridis"  # bright colours are good values
    axis.imshow(cells, cmap=colors, vmin=low, vmax=high, aspect="auto", origin="lower")
    filled = [(sign * y, i, j) for i, line in enumerate(cells) for j, y in enumerate(line) if not math.isnan(y)]
    for y, i, j in filled:
        bright = ((sign * y - low) / (high - low or 1.0) < 0.5) == (sign > 0)
        weight = "bold" if (y, i, j) == min(filled) else "normal"
        color = "black" if bright else "white"
        axis.text(j, i, _text(sign * y), ha="center", va="center", color=color, fontsize=9, weight=weight)
    axis.set_xticks(range(len(xs)), [_text(x) for x in xs])
    axis.set_yticks(range(len(hues)), [_text(hue) for hue in hues])
    axis.set_xlabel(_label(plot.x))
    axis.set_ylabel(_label(plot.hue))


def _draw_search(study: Study, table: Sequence[Row]) -> Any:
    """The objective by trial, and over each searched key; pruned runs are hollow, at their last value."""
    from matplotlib.figure import Figure

    name = study.objective
    shown = [(n, row, row["metrics"].get(name)) for n, row in enumerate(table) if row["status"] in ("done", "pruned")]
    shown = [(n, row, y) for n, row, y in shown if _number(y)]
    done = [(n, y) for n, row, y in shown if row["status"] == "done"]
    if not done:
        return None
    keys = list(study.search.space)
    across = min(1 + len(keys), 3)
    down = math.ceil((1 + len(keys)) / across)
    figure = Figure(figsize=(1.0 + 3.8 * across, 0.6 + 3.1 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    better = min if study.direction == "minimize" else max
    so_far = [better(y for _, y in done[: k + 1]) for k in range(len(done))]
    axes[0].step([n for n, _ in done], so_far, where="post", color="0.6", label="best so far")
    for axis, key in zip(axes, [None, *keys]):
        choices = None if key is None or isinstance(study.search.space[key], Range) else list(study.search.space[key])
        for state, fill in (("done", "C0"), ("pruned", "none")):
            at = [(n if key is None else row["overrides"].get(key), y) for n, row, y in shown if row["status"] == state]
            if at:
                xs = [x if choices is None else choices.index(x) for x, _ in at]
                axis.plot(xs, [y for _, y in at], "o", ms=5, mec="C0", mfc=fill, label=state)
        if choices is not None:
            axis.set_xticks(range(len(choices)), [_text(x) for x in choices])
        elif key is not None and study.search.space[key].log:
            axis.set_xscale("log")
        axis.set_xlabel("trial" if key is None else key)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(name)
    axes[0].legend(fontsize=8)
    for axis in axes[1 + len(keys) :]:
        axis.set_axis_off()
    _title(figure, study)
    return figure


def value(row: Row, key: str) -> Any:
    """An override (by its dotted key or its last part) or a metric of a row; None where it has neither."""
    overrides = row["overrides"]
    for name in overrides:
        if key in (name, name.rsplit(".", 1)[-1]):
            return overrides[name]
    return row["metrics"].get(key)


def _keys(table: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in table for key in row["overrides"]))


def _ordered(values: Any) -> list:
    """The different values: numbers by size, others in the order of the study."""
    different = list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in values))
    return sorted(different) if all(_number(v) for v in different) else different


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _plain(x: Any) -> bool:
    return isinstance(x, int | float | str | bool)


def _label(key: str) -> str:
    return key.rsplit(".", 1)[-1].replace("_", " ")


def _text(x: Any) -> str:
    if x is None:
        return ""
    return f"{x:.4g}" if isinstance(x, float) else str(x)
