"""What `pip install .` installs: the package, and with it the configs and the studies, found from any folder."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from ldm_jax.config import config_file
from ldm_jax.sweeps import study

pytest.importorskip("setuptools")
ROOT = pathlib.Path(__file__).parents[1]


def test_a_wheel_holds_configs_and_studies_that_are_found_from_any_folder(tmp_path, monkeypatch):
    words = ["setup.py", "--quiet", "egg_info", f"--egg-base={tmp_path}", "build_py", f"--build-lib={tmp_path / 'lib'}"]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    installed = tmp_path / "lib" / "ldm_jax"
    assert {p.relative_to(ROOT) for p in ROOT.glob("ldm_jax/**/*.py")} <= {
        p.relative_to(tmp_path / "lib") for p in installed.glob("**/*.py")
    }
    # Beside this package there is no such folder; inside an installed one there is, and it is looked into.
    assert config_file.PROJECT == ROOT
    spec = importlib.util.spec_from_file_location("installed", installed / "config" / "config_file.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    assert theirs.PROJECT == installed / "share"
    monkeypatch.chdir(tmp_path)
    assert theirs.find("configs/quickstart.py").is_relative_to(installed)
    assert theirs.load("configs/quickstart.py:smoke").first_stage.config == "configs/quickstart_vae.py:smoke"
    monkeypatch.setattr(config_file, "PROJECT", theirs.PROJECT)
    assert study.load_study("experiments/lr_width.py").name == "lr_width"
    with pytest.raises(FileNotFoundError, match=r"no study file experiments/none.py"):
        study.load_study("experiments/none.py")
