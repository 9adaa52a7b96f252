import csv
import io

import pytest

from ldm_jax.sweeps import Plot, Study, product, records, results, sweep
from ldm_jax.sweeps.study import make_runs
from tests.sweeps.helpers import fake


@pytest.fixture
def grid(tmp_path):
    """A study of 2 x 3 finished runs, one failed, one that never ran; the score is lr * width."""
    study = Study(
        name="grid",
        commands=fake,
        runs=[
            *product(sweep("model.width", [8, 16]), sweep("optimizer.lr", [1e-4, 3e-4, 1e-3]), [{"seed": 0}]),
            {"model.width": 32, "optimizer.lr": 1e-4, "seed": 0},
            {"model.width": 64, "optimizer.lr": 1e-4, "seed": 0},
        ],
        objective="score",
        direction="maximize",
        columns=("score",),
        plot=Plot("lr", "score", hue="model.width", log_x=True),
        title="A grid",
    )
    runs = make_runs(study, tmp_path)
    for run in runs[:6]:
        records.prepare(run)
        score = run.overrides["optimizer.lr"] * run.overrides["model.width"]
        records.settle(run.folder, "done", metrics={"score": score, "loss": 1.5, "list": [1]}, seconds=90.0)
    records.prepare(runs[6])
    records.settle(runs[6].folder, "failed", error="exit code 1", seconds=30.0)
    return study, runs


def test_the_markdown_table(grid):
    study, runs = grid
    lines = results.markdown(study, results.collect(runs)).splitlines()
    assert lines[0] == "# A grid"
    assert "8 runs: 6 done, 1 failed; 9.5 minutes of work in all." in lines
    assert "The same in all runs: seed = 0." in lines
    assert "The highest score: 0.016 at width = 16, lr = 0.001." in lines
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| width | lr | score | status | minutes |"
    assert table[2] == "| 8 | 0.0001 | 0.0008 | done | 1.5 |"
    assert table[7] == "| **16** | **0.001** | **0.016** | **done** | **1.5** |"
    assert table[8:] == ["| 32 | 0.0001 |  | failed | 0.5 |", "| 64 | 0.0001 |  | waiting |  |"]
    assert lines[-1] == f"- `{runs[6].id}`: exit code 1"


def test_the_csv_holds_everything(grid):
    _, runs = grid
    table = list(csv.DictReader(io.StringIO(results.comma_separated(results.collect(runs)))))
    assert list(table[0]) == [
        *["run", "model.width", "optimizer.lr", "seed", "loss", "score", "status", "seconds", "error"],
    ]
    assert float(table[5]["score"]) == 16 * 1e-3
    assert (table[6]["status"], table[6]["score"], table[6]["error"]) == ("failed", "", "exit code 1")


def test_plots_show_what_was_measured(grid):
    study, runs = grid
    (line_plot,) = results._draw(study, study.plot, results.collect(runs)).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in line_plot.lines}
    assert drawn.keys() == {"width = 8", "width = 16"}
    assert drawn["width = 16"][0] == [1e-4, 3e-4, 1e-3]
    assert drawn["width = 16"][1] == pytest.approx([1.6e-3, 4.8e-3, 1.6e-2])
    assert (line_plot.get_xscale(), line_plot.get_ylabel()) == ("log", "score")
    heat = Plot("lr", "score", hue="width", kind="heat")
    (axis,) = results._draw(study, heat, results.collect(runs)).axes
    assert [text.get_text() for text in axis.texts if text.get_weight() == "bold"] == ["0.016"]
    assert axis.images[0].get_array().shape == (2, 3)
    facets = results._draw(study, Plot("lr", "score", facet="width"), results.collect(runs)).axes
    assert [axis.get_title() for axis in facets] == ["width = 8", "width = 16"]
    some = results._draw(study, Plot("lr", "score", where={"width": 8}), results.collect(runs))
    assert list(some.axes[0].lines[0].get_ydata()) == pytest.approx([8e-4, 2.4e-3, 8e-3])
    assert some.get_suptitle() == "A grid\nwidth = 8"
    names = {results._file_name(Plot("lr", "score", where={"model.width": width})) for width in (8, 16)}
    assert names == {"score_by_lr_width=8", "score_by_lr_width=16"}


def test_keys_with_the_same_last_part_keep_their_dots():
    assert results.short_names(["a.lr", "b.lr", "c.width"]) == {"a.lr": "a.lr", "b.lr": "b.lr", "c.width": "width"}


def test_a_study_without_results_writes_tables_and_no_plot(tmp_path):
    study = Study("s", fake, [{"a": 1}], objective="score", plot=Plot("a", "score"))
    paths = results.write(study, make_runs(study, tmp_path), tmp_path)
    assert [path.name for path in paths] == ["results.md", "results.csv"]
    assert "none done yet" in paths[0].read_text()


def test_a_log_tail_keeps_the_last_state_of_a_progress_bar(tmp_path):
    (tmp_path / "log").write_bytes(b"first\n 1%|\r 50%|\r 99%|\nError: x\n\n")
    assert records.tail(tmp_path / "log") == ["first", " 99%|", "Error: x"]
    assert records.tail(tmp_path / "none") == []


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"a": 1, "b": 2}\n{"a": 3, "b": null}\n{"a": 4, "b"')
    assert records.last_values(tmp_path / "m.jsonl") == {"a": 3, "b": 2}
