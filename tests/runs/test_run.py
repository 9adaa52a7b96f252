"""Durations of a run."""

from ldm_jax.runs import run


def test_a_duration_in_images_is_rounded_up_to_whole_steps():
    assert [run.steps(images, 8) for images in (0, 1, 8, 9, 96)] == [0, 1, 1, 2, 12]
