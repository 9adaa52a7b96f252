"""What pyproject.toml cannot say: configs/ and the studies of experiments/ lie beside the package here, and in a wheel inside it.

There `--config=configs/quickstart.py` and `ldm sweep experiments/NAME.py` find them, whatever the folder (config/config_file.py).
"""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """The package, and ldm_jax/share/{configs,experiments}/*.py; an editable install reads them where they lie."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for folder in ("configs", "experiments"):
            target = pathlib.Path(self.build_lib, "ldm_jax", "share", folder)
            self.mkpath(str(target))
            for file in sorted(pathlib.Path(__file__).parent.joinpath(folder).glob("*.py")):
                self.copy_file(str(file), str(target / file.name))


setup(cmdclass={"build_py": BuildWithConfigs})
