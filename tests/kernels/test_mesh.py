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


SCRIPT = """
import json, sys
import jax, numpy as np
from ldm_jax.training import loop
from tests.training import tiny
c = tiny.config()
with c.unlocked():
    c.optimizer.update(learning_rate=1e-3)
    c.mesh.update(data=int(sys.argv[3]), fsdp=int(sys.argv[4]), min_size=64)
    if int(sys.argv[4]) > 1:
        c.mesh.rules = (("mid.*conv.*/kernel", (None, None, None, "fsdp")),)
assert jax.device_count() == int(sys.argv[2])
result = loop.train(c, sys.argv[1], quiet=True)
print(json.dumps(result))
"""


def train_on(workdir, devices, data, fsdp):
    flags = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(workdir), str(devices), str(data), str(fsdp)],
        env=env,
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_eight_devices_train_as_one_does_and_a_checkpoint_moves_between_them(tmp_path):
    from ldm_jax.runs import checkpoint

    one = train_on(tmp_path / "one", 1, 1, 1)
    eight = train_on(tmp_path / "eight", 8, 2, 4)
    assert abs(one["loss"] - eight["loss"]) < 1e-5
    a = checkpoint.restore_params(tmp_path / "one", 12)
    b = checkpoint.restore_params(tmp_path / "eight", 12)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=1e-5)

    # The eight-device run goes on from its own step 8 on two devices, and ends where it ended.
    import shutil

    shutil.rmtree(checkpoint.folder(tmp_path / "eight") / "12")
    two = train_on(tmp_path / "eight", 2, 1, 2)
    assert two["finished"] and abs(one["loss"] - two["loss"]) < 1e-5
