"""torch-fidelity needs torchvision, which breaks diffusers and transformers beside a CPU build of torch; so these tests
have an environment of their own, which `make test-metrics` sets up. Elsewhere they are skipped and say so.
"""

import importlib.util
import re
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def torchvision_operators():
    """torchvision importable beside any build of torch.

    Where its compiled part does not load, its Python part fails on the first operator that is missing; none of them is
    called here, so each is declared by name until the import goes through.
    """
    missing = [name for name in ("torch", "torchvision", "torch_fidelity") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: `make test-metrics` runs these tests in .venv-metrics")
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision  # noqa: F401

            return library
        except RuntimeError as error:
            name = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if name is None:
                raise
            library.define(f"{name[1]}(Tensor a, Tensor b, float c) -> Tensor")
            for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
