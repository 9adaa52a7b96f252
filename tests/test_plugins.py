"""Plug-ins: the two examples of docs/plugins.md, what a run remembers, and files that are wrong."""

import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from ldm_jax import cli, plugins
from ldm_jax.diffusion import loss
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.evaluation import table
from ldm_jax.runs.log import read_metrics
from ldm_jax.sampling import settings
from ldm_jax.sweeps import study
from tests.training.test_resume import assert_same_bits, stored

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "plugins.md"
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))
TINY = "from tests.training import tiny\ndef get_config(arg=''):\n    c = tiny.config().copy_and_resolve_references().unlock()\n"
VAE = TINY + "    c.data = {'name': 'stripes', 'size': 64}\n    c.train.images = 32\n    return c\n"
DIT = TINY + (
    "    c.task = {'name': 'diffusion', 'prediction': 'flow'}\n"
    "    c.model = {'name': 'dit', 'in_channels': 3, 'patch_size': 8, 'hidden_size': 32, 'depth': 1, 'num_heads': 2}\n"
    "    c.train.update(images=8, checkpoint_every=0, pictures=1)\n"
    "    return c\n"
)
MINE = "from ldm_jax.diffusion.samplers import SAMPLERS\nSAMPLERS['mine'] = lambda: SAMPLERS['euler']()\n"
BEFORE = plugins._tables()


def forget():
    """Begin as a new process does, with no plug-in loaded."""
    for plugin in plugins.loaded():
        sys.modules.pop(f"ldm_jax_plugin_{plugin.sha256[:16]}", None)
    plugins._loaded.clear()
    plugins._installed.clear()
    plugins._restore(BEFORE)


@pytest.fixture(autouse=True)
def fresh():
    yield
    forget()


def ldm(*words):
    """Exit code of a command in what is a new process to the plug-ins."""
    forget()
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The examples and their configs, and a run of each."""
    at = tmp_path_factory.mktemp("plugins")
    for name, text in EXAMPLES.items():
        (at / name).write_text(text)
    (at / "vae.py").write_text(VAE)
    (at / "dit.py").write_text(DIT)
    return at


@pytest.fixture(scope="module")
def stripes(folder):
    """A run of the second example, which was trained with its plug-in named."""
    workdir = folder / "stripes"
    words = (f"--config={folder / 'vae.py'}", f"--workdir={workdir}", "--quiet")
    assert ldm("train", f"--plugin={folder / 'stripes.py'}", *words) == 0
    forget()
    return workdir


def test_a_sampler_and_a_grid_draw(folder, capsys):
    assert ldm("train", f"--config={folder / 'dit.py'}", f"--workdir={folder / 'dit'}", "--quiet") == 0
    words = ["sample", f"--workdir={folder / 'dit'}", "--num=2", "--quiet"]
    plugin = f"--plugin={folder / 'damped.py'}"
    assert ldm(*words, f"--out={folder / 'a'}", plugin, "--sampler=damped:rate=0.5", "--grid=late") == 0
    assert ldm(*words, f"--out={folder / 'b'}", "--sampler=euler", "--grid=uniform") == 0
    # An untrained network: what differs is the damping.
    made_by = json.loads((folder / "a" / "settings.json").read_text())
    assert (made_by["sampler"], made_by["options"], made_by["grid"]) == ("damped", {"rate": 0.5}, "late")
    a, b = (np.load(folder / out / "samples.npz")["arr_0"] for out in "ab")
    assert a.shape == b.shape and not np.array_equal(a, b)
    assert not (folder / "dit" / "plugins.json").exists()
    assert list(made_by["plugins"]) == ["damped.py"] and len(made_by["plugins"]["damped.py"]) == 64
    assert ldm(*words, f"--out={folder / 'd'}", "--sampler=damped") == 2
    assert "'damped' is unknown" in capsys.readouterr().err


def test_late_rows_are_listed_and_used(folder, capsys):
    assert ldm("samplers", "--plugin", folder / "damped.py") == 0
    out = capsys.readouterr().out
    assert re.search(r"^damped +0 +1 +no +- +Euler's step, with `rate`", out, re.MULTILINE) and "\nlate " in out
    assert ldm("samplers", "damped", "--plugin", folder / "damped.py") == 0
    assert capsys.readouterr().out.startswith("damped(rate=0.9)")
    with pytest.raises(SystemExit):
        ldm("evaluate", f"--plugin={folder / 'stripes.py'}", "--help")
    assert re.search(r"^  l1 +mean absolute error", capsys.readouterr().out, re.MULTILINE)
    # A name whose row is a function; a guidance without a neutral scale of its own.
    loss.TIMES["cubed"] = lambda u: u**3
    drawn = loss.sample_times(jax.random.key(0), 1000, "cubed", stratified=True)
    assert float(drawn.mean()) == pytest.approx(0.25, abs=1e-3)
    settings.METHODS["late"] = settings.METHODS["cfg"]
    assert settings.scheduled(settings.Guidance("late", schedule="linear"), 3.0) is not None


def test_a_run_remembers_its_plug_in(folder, stripes):
    record = json.loads((stripes / "plugins.json").read_text())["plugins"]
    copy = stripes / "plugins" / "stripes.py"
    assert [row["path"] for row in record] == [str(folder / "stripes.py")]
    assert copy.read_text() == EXAMPLES["stripes.py"] and not list(folder.rglob("__pycache__"))
    assert read_metrics(stripes / "metrics.jsonl")[-1]["step"] == 4
    # Resumed from its middle without naming the plug-in, on what is another machine: the original is not there.
    moved = folder / "moved"
    shutil.copytree(stripes, moved)
    (folder / "stripes.py").rename(folder / "elsewhere")
    shutil.rmtree(moved / "checkpoints" / "4")
    assert ldm("train", f"--config={folder / 'vae.py'}", f"--workdir={moved}", "--quiet") == 0
    assert_same_bits(stored(moved, 4), stored(stripes, 4))
    assert ldm("evaluate", f"--workdir={moved}", "--metrics=l1,psnr", "--num=8", "--quiet") == 0
    row = read_metrics(moved / "metrics.jsonl")[-1]
    assert 0 < row["l1"] < 255 and list(row["plugins"]) == ["stripes.py"]
    assert ldm("encode", f"--workdir={moved}", "--data=train", f"--out={folder / 'latents'}", "--quiet") == 0
    (folder / "elsewhere").rename(folder / "stripes.py")


def test_a_changed_plug_in_is_refused_unless_it_is_named(folder, stripes, capsys):
    original, copy = folder / "stripes.py", stripes / "plugins" / "stripes.py"
    evaluate = ("evaluate", f"--workdir={stripes}", "--metrics=l1", "--num=8", "--quiet")
    train = ("train", f"--config={folder / 'vae.py'}", f"--workdir={stripes}", "--quiet")
    before = (stripes / "plugins.json").read_bytes()
    original.write_text(EXAMPLES["stripes.py"] + "\n# changed\n")
    try:
        for words in (evaluate, train):
            assert ldm(*words) == 2
            said = capsys.readouterr().err
            assert f"plug-in {original} has changed since" in said and str(copy) in said and said.count("\n") == 1
        assert ldm(*evaluate, f"--plugin={original}") == 0
        assert ldm(*train, f"--plugin={copy}") == 0
        capsys.readouterr()
        assert ldm(*train, f"--plugin={original}") == 2
        assert "was trained with another stripes.py" in capsys.readouterr().err
    finally:
        original.write_text(EXAMPLES["stripes.py"])
    assert (stripes / "plugins.json").read_bytes() == before
    copy.write_text("# damaged\n")
    try:
        assert ldm(*evaluate) == 2
        assert f"{copy} has changed" in capsys.readouterr().err
    finally:
        copy.write_text(EXAMPLES["stripes.py"])


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "plug-in {file} does not exist"),
        ("x = 1\ny = (\n", "plug-in {file}, line 2: SyntaxError: '(' was never closed"),
        (
            "import sys\n\nsys.exit(3)\n",
            "plug-in {file}, line 3: it ends the program (SystemExit: 3); expected it to add rows",
        ),
        (
            "from ldm_jax.diffusion.samplers import SMAPLERS\n",
            "plug-in {file}, line 1: ImportError: cannot import name 'SMAPLERS'",
        ),
        (
            MINE + "SAMPLERS['heun'] = 1\n",
            "plug-in {file}, line 3: 'heun' is in SAMPLERS already; expected another name",
        ),
        (
            MINE + "del SAMPLERS['heun']\n",
            "plug-in {file}, line 3: 'heun' is in SAMPLERS already; expected another name",
        ),
        (MINE + "\n1 / 0\n", "plug-in {file}, line 4: ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_file_is_one_line_and_writes_nothing(text, said, tmp_path, capsys):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    heun = SAMPLERS["heun"]
    words = ("--config=configs/quickstart.py:smoke", f"--workdir={tmp_path / 'run'}")
    assert ldm("train", f"--plugin={file}", *words) == 2
    err = capsys.readouterr().err
    assert said.format(file=file) in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ([] if text is None else ["mine.py"])
    assert SAMPLERS["heun"] is heun and "mine" not in SAMPLERS and "l1" not in table.METRICS and not plugins.loaded()


def test_other_names_are_refused(tmp_path, capsys):
    for words, said in (
        (["--plugin="], "--plugin is empty; expected FILE.py"),
        ([f"--plugin={tmp_path}"], "is not a Python file"),
        ([f"--plugin={PAGE}"], "is not a Python file"),
    ):
        assert ldm("samplers", *words) == 2
        assert said in capsys.readouterr().err
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"{MINE}# {name}\n")
    assert ldm("samplers", *(f"--plugin={tmp_path / name / 'mine.py'}" for name in "ab")) == 2
    assert "two plug-ins are called mine.py" in capsys.readouterr().err


def test_a_file_is_executed_once_and_two_may_not_add_one_name(tmp_path):
    for name, text in (("a.py", MINE), ("copy.py", MINE), ("b.py", MINE + "# another\n")):
        (tmp_path / name).write_text(text)
    (first,) = plugins.load([tmp_path / "a.py"])
    mine = SAMPLERS["mine"]
    plugins.load([tmp_path / "a.py", tmp_path / "copy.py"])
    assert SAMPLERS["mine"] is mine and len(plugins.loaded()) == 1 and first.name == "a.py"
    with pytest.raises(ValueError, match=r"b.py, line 2: 'mine' is in SAMPLERS already"):
        plugins.load([tmp_path / "b.py"])
    assert SAMPLERS["mine"] is mine


def test_a_row_that_is_an_array_is_restored_and_a_broken_record_is_named(tmp_path, monkeypatch, capsys):
    table, value = {"a": np.zeros(3)}, np.ones(3)
    before = [("T", table, dict(table))]
    table["a"] = value
    plugins._restore(before)
    assert table["a"] is not value
    (tmp_path / "plugins.json").write_text('{"plugins": [1]}')
    assert ldm("evaluate", f"--workdir={tmp_path}", "--metrics=l1") == 2
    assert "plugins.json: expected" in capsys.readouterr().err
    # Only folders that a word names are looked into, and the current one is none of them.
    monkeypatch.chdir(tmp_path)
    assert ldm("samplers", "--stochastic") == 0


def test_entry_points_of_installed_packages_are_loaded(tmp_path, monkeypatch, capsys):
    (tmp_path / "their_plugin.py").write_text(MINE)
    (tmp_path / "theirs-1.dist-info").mkdir()
    (tmp_path / "theirs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    entry = tmp_path / "theirs-1.dist-info" / "entry_points.txt"
    entry.write_text("[ldm_jax.plugins]\nmine = their_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ldm("samplers") == 0
    assert "\nmine " in capsys.readouterr().out
    sys.modules.pop("their_plugin")
    (tmp_path / "their_plugin.py").write_text(MINE + "raise ValueError('on line three')\n")
    assert ldm("samplers") == 2
    assert "plug-in mine (their_plugin), line 3: on line three" in capsys.readouterr().err
    sys.modules.pop("their_plugin", None)


def test_a_study_names_it_among_its_words(folder, tmp_path):
    words = [sys.executable, "-m", "ldm_jax", "train", f"--config={folder / 'vae.py'}", "--config.data.split=a"]
    line = [*words, f"--plugin={folder / 'stripes.py'}"]
    with pytest.raises(ValueError, match=r"run a: .*config.data.name='stripes' is unknown"):
        study.check_trainings(study.Run("a", {}, tmp_path, [words], ""))
    with pytest.raises(ValueError, match=r"run a: .*has no key 'data.split'"):
        study.check_trainings(study.Run("a", {}, tmp_path, [line], ""))
