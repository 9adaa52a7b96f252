"""Sharding: rules over paths and shapes, and one step that is the same on one device and on eight."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.kernels import mesh
from ldm_jax.runs import checkpoint
from ldm_jax.training import loop
from tests.training import tiny


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at most one may be -1"):
        mesh.make_mesh(-1, -1, 1)
    with pytest.raises(ValueError, match="does not cover the 1 devices"):
        mesh.make_mesh(1, 3, 1, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="batch size 7 must be a multiple of 2"):
        mesh.check_batch(mesh.make_mesh(), 7, accumulate=2)


FakeMesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 2})


def test_the_shape_rule_and_its_overrides():
    spec = mesh.spec_for
    assert spec("a/kernel", (512, 1024), FakeMesh) == P(None, "fsdp")
    assert spec("a/kernel", (1024, 510), FakeMesh) == P("fsdp", None)
    assert spec("a/bias", (1024,), FakeMesh) == P()  # too small to be worth a gather
    assert spec("a/kernel", (1023, 1021), FakeMesh) == P()  # nothing divides
    rules = (("mlp.*kernel", (None, "tensor")),)
    assert spec("mlp_1/kernel", (512, 1024), FakeMesh, rules) == P(None, "tensor")
    with pytest.raises(ValueError, match="has 2 axes but mlp/kernel has shape"):
        spec("mlp/kernel", (8,), FakeMesh, rules)
    with pytest.raises(ValueError, match="does not split by tensor=2"):
        spec("mlp/kernel", (8, 3), FakeMesh, rules)
    with pytest.raises(ValueError, match="names the axis 'model'"):
        spec("mlp/kernel", (8, 4), FakeMesh, (("mlp", ("model", None)),))


def config(data, fsdp):
    c = tiny.config()
    with c.unlocked():
        c.optimizer.update(learning_rate=1e-3)
        c.mesh.update(data=data, fsdp=fsdp, min_size=64)
        if fsdp > 1:
            c.mesh.rules = (("mid.*conv.*/kernel", (None, None, None, "fsdp")),)
    return c


# The run on eight devices. Then a copy without its last checkpoint goes on from step 8 on two of them.
SCRIPT = """
import functools, json, pathlib, shutil, sys
import jax
from ldm_jax.kernels import mesh
from ldm_jax.runs import checkpoint
from ldm_jax.training import loop
from tests.kernels.test_mesh import config
eight, two = map(pathlib.Path, sys.argv[1:])
assert jax.device_count() == 8
ends = [loop.train(config(2, 4), eight, quiet=True)]
shutil.copytree(eight, two)
shutil.rmtree(checkpoint.folder(two) / "12")
mesh.make_mesh = functools.partial(mesh.make_mesh, devices=jax.devices()[:2])
ends.append(loop.train(config(1, 2), two, quiet=True))
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_eight_devices_train_as_one_does_and_a_checkpoint_moves_between_them(tmp_path):
    one, eight, two = (tmp_path / name for name in ("one", "eight", "two"))
    flags = os.environ.get("XLA_FLAGS", "")
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(eight), str(two)],
        env=os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    loss = loop.train(config(1, 1), one, quiet=True)["loss"]
    for end in json.loads(out.stdout.splitlines()[-1]):
        assert end["finished"] and abs(loss - end["loss"]) < 1e-5
    for folder in (eight, two):
        a, b = (checkpoint.restore_params(x, 12) for x in (one, folder))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
