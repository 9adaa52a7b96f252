"""Settings by name: each that is wrong is named, and what is possible."""

import math

import pytest

from ldm_jax.sampling.settings import METHODS, Settings, check, is_guided


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"name": "ddim", "options": {"etta": 1.0}}, "sampler 'ddim' has no option 'etta'"),
        ({"grid": "karras", "grid_options": {"roh": 1.0}}, "grid 'karras' has no option 'roh'"),
        ({"steps": 0}, "steps is 0"),
        ({"t_lo": 0.7, "t_hi": 0.5}, "guidance interval"),
        ({"name": "ddim", "options": {"eta": -1.0}}, "eta"),
        ({"name": "ddim", "options": {"eta": "much"}}, "sampler 'ddim': eta is 'much'; expected a number"),
        ({"guidance_method": "autoguidance"}, "guidance method 'autoguidance' is unknown; there are apg, cfg, cfg_pp"),
        ({"guidance_method": "apg", "guidance_options": {"etta": 1}}, "has no option 'etta'; it has eta, threshold$"),
        ({"guidance_method": "apg", "guidance_options": {"t_lo": 0.5}}, "has no option 't_lo'"),
        ({"guidance_method": "cfg_pp", "rescale": 0.5}, "'cfg_pp' has no rescale: it is 0.5, expected 0.0"),
        ({"guidance_method": "cfg_zero", "guidance_options": {"kind": "w"}}, "kind is 'w'; there are"),
        ({"guidance_schedule": "linaer"}, "guidance schedule 'linaer' is unknown"),
        ({"guidance_schedule": "powered_cosine"}, "'powered_cosine' needs its option 'power'"),
        ({"guidance_schedule": "powered_cosine", "schedule_options": {"power": 0.0}}, "power is 0.0"),
        ({"guidance_schedule": "linear", "schedule_options": {"shape": "v"}}, "has no option 'shape'; it has floor$"),
        ({"threshold": "dynamical"}, "threshold 'dynamical' is unknown"),
        ({"threshold": "dynamic", "threshold_options": {"percentile": 99.5}}, "percentile is 99.5"),
        ({"threshold": "static", "threshold_options": {"low": 1.0}}, r"clipping to \[1.0, 1.0\]"),
        ({"guidance": math.nan}, "guidance is nan; expected a number of at most 1000"),
        ({"guidance": -math.inf}, "guidance is -inf; expected a number"),
        ({"guidance": 1e9}, "guidance is 1000000000.0; expected a number of at most 1000"),
        ({"rescale": math.nan}, r"rescale is nan; expected a number in \[0, 1\]"),
        ({"rescale": 1.5}, r"rescale is 1.5; expected a number in \[0, 1\]"),
        ({"guidance_method": "apg", "guidance_options": {"eta": math.nan}}, "eta is nan; expected a number"),
        ({"guidance_options": {"channels": 0}}, "channels is 0, expected a number of channels"),
        ({"guidance_options": {"channels": 1.5}}, "channels is 1.5, expected a number of channels"),
    ],
)
def test_what_cannot_be_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        check(Settings(**settings))


def test_which_guidance_needs_the_unconditional_estimate():
    """None at scale 1 for cfg and apg; the other methods, and a scale that changes over time, act there too."""
    methods = {name: is_guided(Settings(guidance_method=name)) for name in METHODS}
    assert methods == {"cfg": False, "apg": False, "cfg_pp": True, "cfg_zero": True}
    assert is_guided(Settings(guidance=1.5)) and is_guided(Settings(guidance_schedule="linear"))
