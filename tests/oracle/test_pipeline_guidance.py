"""Guidance by name, its schedule, its interval, thresholds and options of samplers, for published models: against closed forms."""

import numpy as np
import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from ldm_jax import pipelines  # noqa: E402
from tests.pipelines import published as tiny  # noqa: E402

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd")
    scheduler = diffusers.DDIMScheduler(**tiny.DDIM)
    diffusers.StableDiffusionPipeline(unet=tiny.unet(), scheduler=scheduler, **tiny.sd_parts()).save_pretrained(path)
    return pipelines.load(path)


OPTIONS = {"steps": 4, "guidance": 4.0, "decode": False, "seed": 3}


def draw(pipeline, **options):
    return pipeline.text_to_image("a red cat", "blue", **(OPTIONS | options))


SAME = {
    "apg of eta 1": {"guidance_method": "apg", "guidance_options": {"eta": 1.0}},
    "the whole interval": {"t_lo": 0.0, "t_hi": 1.0},
    "the constant schedule": {"guidance_schedule": "constant"},
    "no threshold": {"threshold": "none"},
    "the sampler's default": {"sampler": "ddim", "options": {"eta": 0.0}},
    "an option of the file's sampler": {"options": {"eta": 0.0}},
}


@pytest.mark.parametrize("name", SAME)
def test_what_adds_nothing_changes_nothing(pipeline, name):
    np.testing.assert_allclose(draw(pipeline, **SAME[name]), draw(pipeline), atol=2e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"guidance_method": "apg"},
        {"guidance_method": "cfg_pp", "guidance": 0.6},
        {"guidance_method": "cfg_zero", "guidance_options": {"t_zero": 0.6}},
        {"guidance_schedule": "linear"},
        {"sampler": "ddim", "options": {"eta": 1.0}},
    ],
)
def test_what_adds_something_changes_something(pipeline, more):
    assert np.abs(draw(pipeline, **more) - draw(pipeline)).max() > 1e-2


def test_the_interval_is_guided_inside_and_unguided_outside(pipeline):
    """Two steps above t = 0.4 under guidance, handed over to two steps without."""
    half = draw(pipeline, end=0.6)
    by_hand = pipeline.image_to_image("a red cat", half, start=0.6, **(OPTIONS | {"guidance": 1.0}))
    np.testing.assert_allclose(draw(pipeline, t_lo=0.4), by_hand, atol=2e-4)
    np.testing.assert_allclose(draw(pipeline, t_lo=0.9), draw(pipeline, guidance=1.0), atol=2e-4)
    assert np.abs(by_hand - draw(pipeline)).max() > 1e-2


def test_cfg_pp_of_ddim_is_cfg_of_another_scale_in_one_step(pipeline):
    """From t to clean data, sigma_s = 0: the scale of CFG++ is that of cfg (guidance.cfg_pp)."""
    one = {"steps": 1, "sampler": "euler"}  # whose grid ends where the file's does, at the first entry of the table
    course = pipeline.course(pipeline.settings(pipelines.Request(**one)), (16, 16))
    process, (t, s) = course.model.process, course.times
    ratio = float(process.sigma(s) * process.alpha(t) / (process.alpha(s) * process.sigma(t)))
    plus = draw(pipeline, **one, guidance_method="cfg_pp", guidance=1.5)
    np.testing.assert_allclose(plus, draw(pipeline, **one, guidance=1.5 / (1 - ratio)), atol=5e-4)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"options": {"etta": 1.0}}, "sampler 'ddim' has no option 'etta'"),
        ({"threshold": "static"}, "this model draws latents"),
        ({"guidance_method": "cgf"}, "guidance method 'cgf' is unknown"),
        ({"guidance_options": {"channels": 5}}, "guidance on 5 channels; the model has 4"),
        ({"t_lo": 0.6, "t_hi": 0.5}, "guidance interval 0.6..0.5"),
        ({"guidance_method": "cfg_pp", "rescale": 0.5}, "'cfg_pp' has no rescale"),
    ],
)
def test_settings_that_do_not_fit(pipeline, options, said):
    with pytest.raises(ValueError, match=said):
        draw(pipeline, **options)
    with pytest.raises(TypeError, match=r"text_to_image\(\) got an unexpected keyword argument 'strength'"):
        draw(pipeline, strength=0.5)
