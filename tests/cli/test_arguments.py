"""Help, flags and config files, before any work is done."""

import argparse
import re
import warnings

import numpy as np
import pytest

from ldm_jax import cli
from ldm_jax.config import config_file

QUICK = "configs/quickstart.py"


def fails(words, capsys):
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"ldm {verb}" in said and ("--workdir" in said or verb in ("samplers", "generate", "convert", "data"))


def test_the_bare_command_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in cli.VERBS)


@pytest.mark.parametrize(
    "words, said",
    [
        (["trian"], "ldm: unknown verb 'trian'; did you mean train?"),
        (["foo"], "ldm: unknown verb 'foo'; there are train, data,"),
        (["sample"], "ldm sample: needs --workdir, --num, --out"),
        (["sample", "--workdri=x"], "ldm sample: unknown argument '--workdri=x'; did you mean --workdir?"),
        (["sample", "--out=x", "--work=y"], "unknown argument '--work=y'; did you mean --workdir?"),
        (["sample", "--config.seed=3"], "unknown argument '--config.seed=3'"),
        (["sample", "--num=1e3"], "--num='1e3'; expected a whole number"),
        (["sample", "--num"], "--num needs a value"),
        (["sample", "--guidance=much"], "--guidance='much'; expected a number"),
        (["sample", "--quiet=no"], "--quiet='no': it takes no value"),
        (["generate", "--model=x", "--dtype=half"], "--dtype='half'; expected one of 'float32', 'bfloat16'"),
        (
            ["generate", "--model=/nowhere", "--out={tmp}", "--prompt", "-- fog --"],
            "/nowhere: expected a pipeline's folder",
        ),
        (["samplers", "--stochastic", "--deterministic"], "--deterministic does not go with --stochastic"),
        (["samplers", "heun", "ddim"], "unknown argument 'ddim'"),
        (["sweep", "x.py", "--workdir={tmp}", "--publish=README.md"], "README.md is no folder"),
        (["train", "--workdir=x"], "--config"),
        (["train", "--config=configs/quickstrat.py", "--workdir=x"], "did you mean configs/quickstart.py"),
        (["train", f"--config={QUICK}:tiny", "--workdir=x"], "unknown argument 'tiny'"),
        (["train", f"--config={QUICK}", "--workdir=x", "--config.train.image=3"], "did you mean train.images"),
        (["train", f"--config={QUICK}", "--workdir=x", "--config.train.images=many"], "train.images"),
        (["train", f"--config={QUICK}", "--workdir=x", "--confg.train.images=3"], "unknown argument"),
        (["train", f"--config={QUICK}", "--workdir=x", "--processes=2"], "go with --distributed"),
        (["train", f"--config={QUICK}", "--workdir={tmp}", "--config.train.batch_size=0"], "train.batch_size=0"),
        (["train", f"--config={QUICK}", "--workdir={tmp}", "--config.model.name=dot"], "model.name='dot'"),
        (["train", f"--config={QUICK}", "--workdir={tmp}", "--config.sampler.grid=even"], "grid 'even'"),
        (["train", f"--config={QUICK}", "--workdir={tmp}", "--config.sampler.guidance_method=cgf"], "method 'cgf'"),
        (["train", f"--config={QUICK}", "--workdir={tmp}", "--config.sampler.threshold=hard"], "threshold 'hard'"),
        (["train", f"--config={QUICK}", "--workdir={tmp}", "--config.precision=half"], "precision='half'"),
        (["sample", "--workdir=/nowhere", "--num=1", "--out=x"], "is not a run"),
        (["sample", "--workdir=/nowhere", "--num=1", "--out=x", "--stps=3"], "unknown argument '--stps=3'"),
        (["evaluate", "--workdir=/nowhere", "--metrics=fid"], "/nowhere: no such run"),
        (["encode", "--workdir=/nowhere", "--data=train", "--out=x"], "/nowhere: no such run"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, said, capsys, tmp_path):
    words = [word.format(tmp=tmp_path / "run") for word in words]
    code, error = fails(words, capsys)
    assert code == 2
    assert said in error and error.startswith("ldm") and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "config.json").exists(), "nothing is written for a config that cannot run"


def test_warnings_are_one_line_each_without_the_code_that_said_them(monkeypatch):
    lines = []
    monkeypatch.setattr(
        "ldm_jax.cli.samplers.run",
        lambda *args: lines.append(warnings.formatwarning(UserWarning("a\n b"), UserWarning, "file.py", 3)) or 0,
    )
    before = warnings.formatwarning
    assert cli.main(["samplers"]) == 0 and lines == ["ldm samplers: warning: a b\n"]
    assert warnings.formatwarning is before


def test_overrides_reach_the_config():
    config = config_file.load(
        QUICK, ["--config.train.images=7", "--config.ema.half_lives=(1.0,2.0)", "--config.sampler.name=ddim"]
    )
    assert config.train.images == 7 and config.ema.half_lives == (1.0, 2.0) and config.sampler.name == "ddim"


def test_samplers_are_listed_with_their_facts(capsys):
    from ldm_jax.diffusion.grids import GRIDS
    from ldm_jax.diffusion.samplers import SAMPLERS

    assert cli.main(["samplers"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    names = {row[0]: row for row in rows}
    assert set(SAMPLERS) | set(GRIDS) <= set(names)
    assert names["heun"][1:5] == ["2", "2", "no", "2206.00364"]
    for flag, stochastic in (("--stochastic", True), ("--deterministic", False)):
        assert cli.main(["samplers", flag]) == 0
        listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
        assert listed == {name for name, make in SAMPLERS.items() if make().stochastic is stochastic}
    assert cli.main(["samplers", "ddim"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ddim(eta=0.0)") and "2010.02502" in said
    for name, option in (("apg", "eta"), ("dynamic", "percentile")):
        assert {name, "linear,"} <= set(names) | {word for row in rows for word in row}
        assert cli.main(["samplers", name]) == 0
        assert option in capsys.readouterr().out
    assert fails(["samplers", "eulr"], capsys)[0] == 2


def test_help_names_every_guidance_method_and_threshold(capsys):
    from ldm_jax.sampling.settings import METHODS, THRESHOLDS

    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    methods = said[said.rindex("--guidance-method NAME") :].partition("--guidance-schedule")[0]
    thresholds = said[said.rindex("--threshold NAME") :].partition("--seed")[0]
    assert all(name in methods for name in METHODS) and all(name in thresholds for name in THRESHOLDS)


def test_a_name_and_its_options_are_read_off_one_word():
    from ldm_jax.cli.drawing import named

    assert named("--sampler", "ddim") == ("ddim", {})
    assert named("--x", "a:b=1,c=-0.5,d=inf,e=true,f=large") == (
        "a",
        {"b": 1, "c": -0.5, "d": float("inf"), "e": True, "f": "large"},
    )
    with pytest.raises(ValueError, match=r"--x=a:b=nan: 'b=nan' is not a number"):
        named("--x", "a:b=nan")
    for wrong in ("a:b", "a:b=", "a:=1", "a:b=1,"):
        with pytest.raises(ValueError, match=f"--x={wrong}: .* expected NAME:OPTION=VALUE"):
            named("--x", wrong)


def test_a_list_of_names_is_cut_where_a_name_begins():
    from ldm_jax.cli.drawing import names

    assert names("ddim:eta=0.5,noise=1,euler") == ["ddim:eta=0.5,noise=1", "euler"]
    assert names("ddim:eta=0,ddim:eta=1") == ["ddim:eta=0", "ddim:eta=1"]


def test_a_grid_has_a_column_for_each_value_of_the_last_list():
    from ldm_jax.cli import drawing

    parser = argparse.ArgumentParser()
    drawing.add_arguments(parser)
    words = ["--sampler=ddim,heun", "--guidance=2", "--classifier=x", "--classifier-scale=0,1,4"]
    made = drawing.variants(parser.parse_args(words))
    assert [(v.sampler, drawing.classifier(v)) for v in made] == [
        (s, ("x", w)) for s in ("ddim", "heun") for w in (0, 1, 4)
    ]
    images = np.arange(12).reshape(6, 2, 1, 1, 1)
    cells, columns, labels = drawing.side_by_side(made, images, ["cat", "dog"])
    assert columns == 3 and cells.ravel().tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert labels[4] == "heun, classifier 1, cat" and labels[-1] == "heun, classifier 4, dog"


def test_every_sampler_says_what_it_is():
    from ldm_jax.cli.samplers import facts
    from ldm_jax.diffusion.samplers import SAMPLERS

    assert len(set(SAMPLERS.values())) == len(SAMPLERS), "one name has another's function"
    for name, _, _, _, arxiv, headline in facts():
        assert arxiv != "-" or re.search(r"\b(19|20)\d\d\b", SAMPLERS[name].__doc__), f"{name}: no source"
        assert len(headline) < 160, f"{name}: the first line is not a line"


@pytest.mark.parametrize(
    "words, said",
    [
        (["train", f"--config={QUICK}", "--workdir="], "--workdir is empty"),
        (["train", f"--config={QUICK}", "--workdir", ""], "--workdir is empty"),
        (["sample", "--workdir=runs/a", "--num=1", "--out="], "--out is empty"),
        (["evaluate", "--workdir=", "--metrics=fid"], "--workdir is empty"),
        (["encode", "--workdir=runs/a", "--data=train", "--out", ""], "--out is empty"),
        (["sweep", "experiments/lr_width.py", "--workdir="], "--workdir is empty"),
        (["generate", "--model=", "--prompt=x"], "--model is empty"),
    ],
)
def test_an_empty_folder_is_not_the_current_one(words, said, capsys):
    code, error = fails(words, capsys)
    assert code == 2 and said in error
