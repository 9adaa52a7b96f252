"""Manifests: what counts as damage to a checkpoint, file by file and line by line."""

import json

import pytest

from ldm_jax.runs import checkpoint


@pytest.fixture
def step(tmp_path):
    folder = tmp_path / "checkpoints" / "7"
    for name in ("state/d/0", "state/manifest.ocdbt", "state/manifest.json", "meta/metadata", "_CHECKPOINT_METADATA"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    checkpoint.write_manifest(folder)
    return folder


def lines(step, change):
    sums = json.loads((step / checkpoint.MANIFEST).read_text())
    change(sums)
    (step / checkpoint.MANIFEST).write_text(json.dumps(sums))


DAMAGES = {
    "a byte": (lambda step: (step / "state/d/0").write_text("state/d/1"), "state/d/0 differs from its sha256"),
    "a file gone": (lambda step: (step / "meta/metadata").unlink(), "meta/metadata is missing"),
    "a file more": (lambda step: (step / "state/d/1").write_text(""), "state/d/1 has no line in manifest.json"),
    "a manifest of an item": (
        lambda step: (step / "state/manifest.json").write_text("x"),
        "state/manifest.json differs from its sha256",
    ),
    # The line of a damaged file is lost with it.
    "a line less": (
        lambda step: ((step / "state/d/0").write_text("x"), lines(step, lambda sums: sums.pop("state/d/0"))),
        "state/d/0 has no line in manifest.json",
    ),
    "a line more": (lambda step: lines(step, lambda sums: sums.update(a="0")), "a is missing"),
    "a line that leads out": (lambda step: lines(step, lambda sums: sums.update({"../8": "0"})), "../8 is missing"),
    "no lines": (lambda step: (step / checkpoint.MANIFEST).write_text("{}"), "manifest.json lists no file"),
    "a list": (lambda step: (step / checkpoint.MANIFEST).write_text("[1]"), "manifest.json lists no file"),
    "half a manifest": (lambda step: (step / checkpoint.MANIFEST).write_text('{"a'), "manifest.json is not readable"),
    "no manifest": (lambda step: (step / checkpoint.MANIFEST).unlink(), "no manifest.json: the save was interrupted"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_every_file_has_its_line_and_every_line_its_file(step, what):
    assert checkpoint.damage(step) is None
    harm, expected = DAMAGES[what]
    harm(step)
    assert checkpoint.damage(step) == expected


def test_what_a_file_manager_leaves_is_no_damage(step):
    for name in (".DS_Store", "state/Thumbs.db", "state/._d", "meta/.nfs00001", "manifest.json.partial"):
        (step / name).write_text("x")
    assert checkpoint.damage(step) is None
