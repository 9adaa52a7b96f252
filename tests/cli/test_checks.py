"""What is wrong with a number or a folder of a command line, before any work is done."""

import os
import re

import pytest

from ldm_jax.cli import checks


def test_folders_that_can_be_made_are_not_made_yet(tmp_path):
    for path in (tmp_path, tmp_path / "a" / "b", "relative/and/new", tmp_path / "ü \u00a0"):
        assert checks.folder("out", str(path)) == type(tmp_path)(path)
    assert not list(tmp_path.iterdir()) and not os.path.lexists("relative")


@pytest.mark.parametrize("name", ["", "  ", "{file}", "{file}/a/b", "{link}/a", "a\nb", "x" * 5000, "{locked}/a"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, name):
    places = {"file": tmp_path / "file", "link": tmp_path / "link", "locked": tmp_path / "locked"}
    places["file"].write_text("")
    places["link"].symlink_to(tmp_path / "nowhere")
    places["locked"].mkdir(mode=0o500)
    if "locked" in name and os.access(places["locked"], os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(ValueError, match=r"^--out=") as error:
        checks.folder("out", name.format(**places))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e39])
def test_a_scale_is_a_finite_float32(value):
    with pytest.raises(ValueError, match=r"^--guidance=.*; expected a finite number$"):
        checks.scale("guidance", value)
    for right in (None, 0.0, -1.0, 1e38):
        checks.scale("guidance", right)


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(ValueError, match=r"^--text='\\udcff'; expected text in UTF-8$"):
        checks.text("text", "\udcff")
    for right in (None, "", "狐 ❤"):
        checks.text("text", right)


@pytest.mark.parametrize(
    "value, said", [(0, "--num=0; expected at least 1"), (10**30, f"--num={10**30}; expected at most 10000000")]
)
def test_a_number_out_of_its_range_says_so(value, said):
    with pytest.raises(ValueError, match=rf"^{re.escape(said)}$"):
        checks.number("num", value, 1, checks.MOST_IMAGES)
    for right in (None, 1, checks.MOST_IMAGES):
        checks.number("num", right, 1, checks.MOST_IMAGES)


def test_the_rule_of_consistency_networks_on_another_network_is_warned_of(recwarn):
    for sampler, distilled in (("lcm", True), ("tcd", True), ("euler", False), (None, False)):
        checks.consistency(sampler, distilled)
    assert not recwarn.list
    for sampler in ("lcm", "tcd"):
        with pytest.warns(UserWarning, match=f"^--sampler={sampler} is for consistency networks"):
            checks.consistency(sampler, False)
