"""A study's first stages are looked at before its runs are submitted."""

import json
import pathlib

import pytest

from ldm_jax import cli
from ldm_jax.sweeps import first_stages
from ldm_jax.sweeps.study import Study, make_runs, train_and_evaluate
from ldm_jax.weights import files, hub


def runs(tmp_path, *places, config="configs/quickstart.py"):
    overrides = [{"first_stage.workdir": str(place)} for place in places] or [{"seed": 1}]
    return make_runs(Study("study", train_and_evaluate(config), runs=overrides), tmp_path)


@pytest.fixture
def vae(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    files.write_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {})
    return tmp_path / "vae"


def test_what_is_there_or_made_by_the_study_passes(tmp_path, vae, monkeypatch):
    fetched = []

    def resolve(path, wanted=()):
        if not str(path).startswith("hub:"):
            return pathlib.Path(path)
        fetched.append(path)
        return vae

    def commands(overrides, folder):
        first = ["ldm", "train", "--config=configs/quickstart_vae.py", f"--workdir={folder}/vae"]
        return [first, ["ldm", "train", "--config=configs/quickstart.py", f"--config.first_stage.workdir={folder}/vae"]]

    monkeypatch.setattr(hub, "resolve", resolve)
    ours = make_runs(Study("study", commands, runs=[{"seed": 1}]), tmp_path)
    first_stages.check([*runs(tmp_path, "hub:a/b"), *runs(tmp_path), *ours])
    assert fetched == ["hub:a/b"]
    config = tmp_path / "configs" / "named.py"
    config.parent.mkdir()
    text = "from configs import quickstart\ndef get_config(arg=''):\n    c = quickstart.get_config()\n"
    config.write_text(text + "    c.first_stage.workdir = 'hub:c/d'\n    return c\n")
    first_stages.check(runs(tmp_path, config=str(config)))
    assert fetched == ["hub:a/b", "hub:c/d"]


def test_what_is_missing_or_none_is_one_line_before_anything_is_submitted(tmp_path, vae, capsys):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for place, said in (("gone", "no such run, folder or file"), ("unet", "a network of the class UNet2DModel")):
        with pytest.raises(
            ValueError, match=rf"first_stage.workdir=.*{place}, which runs of this study name: .*{said}"
        ):
            first_stages.check(runs(tmp_path, vae, tmp_path / place))
    study = tmp_path / "study.py"
    study.write_text(
        "from ldm_jax.sweeps.study import Study, train_and_evaluate\n"
        "def get_study():\n"
        f"    runs = [{{'first_stage.workdir': {str(tmp_path / 'gone')!r}}}]\n"
        "    return Study('study', train_and_evaluate('configs/quickstart.py'), runs=runs)\n"
    )
    assert cli.main(["sweep", str(study), f"--workdir={tmp_path / 'work'}"]) == 2
    assert "which runs of this study name" in capsys.readouterr().err and not (tmp_path / "work").exists()
